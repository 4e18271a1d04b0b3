//! A model that joins those that take turns.

use super::member::Member;
use super::rings::Rings;
use super::turns::map_within;
use super::{Engine, EngineOptions, check_count};
use crate::base::{Error, Result};
use crate::spill::{Home, Placed};
use std::sync::Arc;

impl Engine {
    /// Adds a model whose shards run anywhere to those that take turns, and gives its number. Waits until the devices
    /// have come to rest between units, so that the slots which models share can be laid out anew; no bit of any model
    /// depends on where they lie.
    ///
    /// # Errors
    /// [`Error::OutOfBudget`] when the arenas have no room for it, [`Error::Device`] when the host has none or a device
    /// fails, [`Error::BadInput`] when models do not take turns here, when there are as many as can be, or this one is
    /// at home on devices: what others keep there would have to move. But for a failed device nothing has changed then.
    pub fn wait_add(&mut self, placed: &Placed, options: EngineOptions) -> Result<usize> {
        if placed.home != Home::Anywhere {
            return Err(Error::bad("a model at home on devices cannot join others; one that runs anywhere can"));
        }
        let Some(turns) = &mut self.turns else { return Err(Error::bad("models that run in lines take no others")) };
        check_count(self.members.len() + 1)?;
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
            // What has changed meanwhile was not asked about.
            (turns.paused, turns.dirty) = (false, true);
        }
        let home = home?;
        self.patience_secs = self.patience_secs.max(options.patience_secs);
        let mut maps = map.maps.into_iter().map(|maps| maps.into_iter().map(Arc::new).collect::<Vec<_>>());
        for (member, maps) in self.members.iter_mut().zip(maps.by_ref()) {
            if member.placed.home == Home::Anywhere {
                member.losses_on.fill(0);
                member.norms_on.fill(0);
            }
            member.maps = maps;
        }
        let maps = maps.next().expect("the models have maps, and so has the one that joins them");
        let mut rings = Vec::new();
        for (map, shared) in maps.iter().zip(&mut self.shared_rings) {
            let ring = *shared.get_or_insert(self.rings.len());
            // Slots are empty again: what they held lies elsewhere now.
            match self.rings.get_mut(ring) {
                Some(rings) => *rings = Rings::new(map, true),
                None => self.rings.push(Rings::new(map, true)),
            }
            rings.push(ring);
        }
        let member = Member::new(placed, maps, rings, home, self.device.lanes(), options);
        if let Some(turns) = &mut self.turns {
            turns.add(&member);
        }
        self.members.push(member);
        self.take_turns()?;
        Ok(self.members.len() - 1)
    }
}
