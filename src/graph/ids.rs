//! Which integers a batch may contain: those with which no op reads outside a table or a row.

use super::graph::{Graph, Source};
use super::op::Op;
use crate::base::IGNORED;

/// The integers that an input may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// Ids are at least 0 and below this: the rows of a table, the columns of logits.
    pub below: usize,
    /// Whether [`IGNORED`] is allowed too: for labels of rows that do not count.
    pub or_ignored: bool,
}

impl IdRange {
    /// Whether the range contains `id`.
    pub fn contains(&self, id: i32) -> bool {
        usize::try_from(id).is_ok_and(|id| id < self.below) || self.or_ignored && id == IGNORED
    }

    fn within(self, other: IdRange) -> IdRange {
        IdRange { below: self.below.min(other.below), or_ignored: self.or_ignored && other.or_ignored }
    }
}

impl Graph {
    /// The integers that an input may hold, as required by the ops that read it; `None` without a restriction: for a
    /// mask, and for inputs that are not integers.
    pub fn id_range(&self, input: usize) -> Option<IdRange> {
        let forward = self.nodes[..self.forward_nodes].iter();
        let reads = |&value: &_| self.info(self.root(value)).source == Source::Input(input);
        let ranges = forward.filter_map(|node| match node.op {
            Op::Embedding { .. } if reads(&node.inputs[0]) => {
                Some(IdRange { below: self.info(node.inputs[1]).shape.rows(), or_ignored: false })
            }
            Op::CrossEntropy if reads(&node.inputs[1]) => {
                Some(IdRange { below: self.info(node.inputs[0]).shape.cols(), or_ignored: true })
            }
            _ => None,
        });
        ranges.reduce(IdRange::within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::DType;
    use crate::graph::{Builder, Init, Mode};

    #[test]
    fn ranges_are_those_of_tables_and_logits() {
        let mut b = Builder::new(Mode::Training, DType::F32);
        let ids = b.input("ids", [2, 3], DType::I32).unwrap();
        let both = b.input("both", [6], DType::I32).unwrap();
        b.input("mask", [2, 3], DType::I32).unwrap();
        let logits = b.layer("layer", |b, _| {
            let [large, small] = [("large", 9), ("small", 7)]
                .map(|(name, rows)| b.parameter(name, [rows, 4], Init::Constant(0.0)).unwrap());
            let flat = b.reshape(ids, [6])?;
            let (x, y, z) = (b.embedding(flat, large)?, b.embedding(both, small)?, b.embedding(flat, small)?);
            let x = b.add(x, y)?;
            b.add(x, z)
        });
        b.cross_entropy(logits.unwrap(), both).unwrap();
        let graph = b.finish().unwrap();
        assert_eq!(graph.id_range(0), Some(IdRange { below: 7, or_ignored: false }));
        assert_eq!(graph.id_range(1), Some(IdRange { below: 4, or_ignored: false }));
        assert_eq!(graph.id_range(2), None);
        let labels = IdRange { below: 4, or_ignored: true };
        assert!([0, 3, IGNORED].iter().all(|&id| labels.contains(id)));
        assert!([-1, 4, i32::MIN, i32::MAX].iter().all(|&id| !labels.contains(id)));
        assert!(!IdRange { below: 4, or_ignored: false }.contains(IGNORED));
    }
}
