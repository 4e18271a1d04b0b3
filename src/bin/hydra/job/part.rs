//! `run.part`: the models of a job that one of several machines trains.
//!
//! Models are dealt out in the file's order, so that each machine knows its own without asking another.

use super::model::Model;
use super::search::Search;
use super::section::{MOST, Section, show};
use hydra::base::Result;
use std::fmt;

/// Part `index` of `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub index: u64,
    /// At least 1.
    pub count: u64,
}

impl Part {
    /// Reads the key.
    pub fn read(s: &Section) -> Result<Option<Part>> {
        let read = |text: &str| {
            let (index, count) = text.split_once('/')?;
            let part = Part { index: index.trim().parse().ok()?, count: count.trim().parse().ok()? };
            (part.index < part.count && part.count <= MOST).then_some(part)
        };
        let Some(value) = s.value("part") else { return Ok(None) };
        let part = value.as_str().and_then(read);
        let want = "want a part and how many there are, from \"0/8\" to \"7/8\"";
        part.map(Some).ok_or_else(|| s.fault("part", format!("{want}, got {}", show(value))))
    }

    /// The folder of its run within the whole run's.
    pub fn folder(self) -> String {
        format!("part-{}-of-{}", self.index, self.count)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// Deals out groups of models that stay together.
pub struct Dealer {
    part: Part,
    dealt: u64,
}

impl Dealer {
    /// Starts with nothing dealt out; without a part, everything goes to this machine.
    pub fn new(part: Option<Part>) -> Dealer {
        Dealer { part: part.unwrap_or(Part { index: 0, count: 1 }), dealt: 0 }
    }

    /// Whether the next group belongs to this part.
    fn is_mine(&mut self) -> bool {
        self.dealt += 1;
        (self.dealt - 1) % self.part.count == self.part.index
    }

    /// The number of groups dealt out so far.
    pub fn dealt(&self) -> u64 {
        self.dealt
    }

    /// This part's share of the models made from one `[[model]]`, the first of which gets the number `first`. Models
    /// that are compared with each other stay together.
    pub fn deal(&mut self, first: usize, models: Vec<Model>, search: Option<Search>) -> (Vec<Model>, Option<Search>) {
        let compares = search.as_ref().is_some_and(Search::compares);
        let mine: Vec<Model> = match compares {
            true if self.is_mine() => models,
            true => Vec::new(),
            false => models.into_iter().filter(|_| self.is_mine()).collect(),
        };
        let models = first..first + mine.len();
        (mine, search.filter(|_| !models.is_empty()).map(|search| Search { models, ..search }))
    }
}
