//! A model that joins those that take turns.

use super::member::Member;
use super::rings::Rings;
use super::turns::map_within;
use super::{Engine, EngineOptions};
use crate::base::{Error, Result};
use crate::spill::{Home, Placed};
use std::sync::Arc;

impl Engine {
    /// Adds a model to those that take turns, and gives its number. Waits until the devices have come to rest between
    /// units, so that the slots which models share can be laid out anew; no bit of any model depends on where they lie.
    ///
    /// # Errors
    /// [`Error::OutOfBudget`] when the arenas have no room for it, [`Error::Device`] when the host has none or a device
    /// fails, [`Error::BadInput`] when models do not take turns here. But for a failed device nothing has changed then.
    pub fn wait_add(&mut self, placed: &Placed, options: EngineOptions) -> Result<usize> {
        let Some(turns) = &mut self.turns else { return Err(Error::bad("models that run in lines take no others")) };
        let mut all: Vec<Placed> = self.members.iter().map(|m| m.placed.clone()).collect();
        all.push(placed.clone());
        let map = map_within(&all, &turns.arena_bytes);
        for (d, (&needs, &has)) in map.arena_bytes.iter().zip(&turns.room_bytes).enumerate() {
            if needs > has {
                let message = format!("device {d} has an arena of {has} bytes, with this model it would need {needs}");
                return Err(Error::OutOfBudget { message, smallest_device_bytes: needs });
            }
        }
        turns.paused = true;
        while !self.queue.is_empty() {
            self.wait_one()?;
        }
        // The disk first: what it refuses is not there yet, while host memory that was given stays.
        let disk = match placed.plan.host.disk_bytes {
            0 => Ok(0),
            bytes => self.device.grow_disk(bytes),
        };
        let home = disk.and_then(|disk| Ok((self.device.grow_host(placed.plan.host.bytes)?, disk)));
        if let Some(turns) = &mut self.turns {
            // What was stirred meanwhile was not asked about.
            (turns.paused, turns.stirred) = (false, true);
        }
        let home = home?;
        self.patience_secs = self.patience_secs.max(options.patience_secs);
        let number = self.members.len();
        let new_maps = map.maps.into_iter().map(|maps| maps.into_iter().map(Arc::new).collect::<Vec<_>>());
        let mut ring_of = Vec::new();
        for (m, maps) in new_maps.enumerate() {
            let shares = all[m].home == Home::Anywhere;
            if let Some(member) = self.members.get_mut(m) {
                if shares {
                    member.losses_on.fill(0);
                }
                member.maps = maps;
                continue;
            }
            for (d, map) in maps.iter().enumerate() {
                let ring = if shares { self.shared_rings[d] } else { None };
                ring_of.push(ring.unwrap_or_else(|| {
                    self.rings.push(Rings::new(map, shares));
                    self.rings.len() - 1
                }));
                if shares {
                    // Slots are empty again: what they held lies elsewhere now.
                    self.rings[ring_of[d]] = Rings::new(map, true);
                    self.shared_rings[d] = Some(ring_of[d]);
                }
            }
            let options = options.clone();
            self.members.push(Member::new(placed, maps, std::mem::take(&mut ring_of), home, options));
        }
        if let Some(turns) = &mut self.turns {
            turns.add(&self.members[number]);
        }
        self.take_turns()?;
        Ok(number)
    }
}
