//! Who waits for whom, for people.

use super::Queue;
use super::entries::Entry;
use crate::engine::hazards::TaskId;

impl Queue {
    /// Who waits for whom, for people: the head of every lane, or else the first task that has not reached it.
    pub fn describe_stall(&self) -> String {
        let mut text = String::new();
        for (number, lane) in self.lanes.iter().enumerate() {
            let next = || {
                let to_come = |e: &&Entry| e.lane as usize == number && e.task.is_some();
                self.entries.all.iter().find(to_come)
            };
            text += &format!("\n  {}: ", lane.id);
            let Some(entry) = lane.in_flight.front().and_then(|&id| self.entries.get(id)) else {
                text += &match next().map(|entry| (self.describe(entry), self.waits_for(entry))) {
                    Some((name, Some(others))) => format!("idle; {name} waits for {others}"),
                    Some((name, None)) => format!("idle; {name} is ready"),
                    None => "idle".into(),
                };
                continue;
            };
            text += &match self.waits_for(entry) {
                Some(others) => format!("{} waits for {others}", self.describe(entry)),
                None => format!("{} has not ended", self.describe(entry)),
            };
            let list = |text: &mut String, what: &str, ids: &mut dyn Iterator<Item = TaskId>| {
                let names = self.describe_all(ids.filter_map(|id| self.entries.get(id)));
                names.into_iter().for_each(|names| *text += &format!("; {what}: {names}"));
            };
            list(&mut text, "behind it on its lane", &mut lane.in_flight.iter().skip(1).copied());
            list(&mut text, "waiting for it", &mut entry.dependents.iter().copied());
        }
        text
    }

    fn describe(&self, entry: &Entry) -> String {
        format!("{} (step {}, {})", entry.tag.name, entry.tag.step, self.lanes[entry.lane as usize].id)
    }

    /// The tasks that one waits for and that are not done; `None` when there are none.
    fn waits_for(&self, entry: &Entry) -> Option<String> {
        self.describe_all(entry.after.iter().filter_map(|&d| self.entries.get(d)).filter(|e| !e.done))
    }

    fn describe_all<'a>(&self, mut entries: impl Iterator<Item = &'a Entry>) -> Option<String> {
        const MOST: usize = 4;
        let names: Vec<String> = entries.by_ref().take(MOST).map(|e| self.describe(e)).collect();
        let more = match entries.count() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        (!names.is_empty()).then(|| names.join(", ") + &more)
    }
}
