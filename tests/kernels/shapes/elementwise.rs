//! Elementwise ops, lookups and transposes.

use crate::cases::Table;
use hydra::base::{DType, Shape};
use hydra::graph::Activation;

/// Adds the cases.
pub fn cases(t: &mut Table) {
    lookups(t);
    pointwise(t);
    transposes(t);
}

fn lookups(t: &mut Table) {
    // Rows that are aligned and rows that are not; ids of one digit and of two, in one sorting block and in two.
    for (tokens, table, cols) in
        [(17, 300, 8), (65, 7, 132), (33, 7, 129), (2055, 1000, 3), (200, 7, 264), (70, 40, 777)]
    {
        let name = if table > 255 { "tokens" } else { "ids" };
        t.add(format!("embedding {tokens} of {table}x{cols}"), move |s| {
            let ids = s.b.input(name, [1, tokens], DType::I32)?;
            let table = s.leaf("table", [table, cols])?;
            s.b.embedding(ids, table)
        });
    }
    for (padding, table, cols) in [(0, 300, 129), (6, 7, 264), (299, 300, 8)] {
        let name = if table > 255 { "tokens" } else { "ids" };
        t.add(format!("embedding of {table}x{cols}, padding {padding}"), move |s| {
            let ids = s.b.input(name, [1, 200], DType::I32)?;
            let table = s.leaf("table", [table, cols])?;
            s.b.embedding_padded(ids, table, Some(padding))
        });
    }
    for (b, len, cols, table) in [(5, 33, 8, 40), (9, 2, 1028, 2), (2, 65, 127, 65), (17, 3, 7, 4)] {
        t.add(format!("add_position {b}x{len}x{cols} of {table}"), move |s| {
            let (x, table) = (s.leaf("x", [b, len, cols])?, s.leaf("table", [table, cols])?);
            s.b.add_position(x, table)
        });
    }
}

fn pointwise(t: &mut Table) {
    // One block and two of f32 and of bf16, with and without a tail.
    for (rows, cols) in [(7, 1), (1, 4107), (64, 129)] {
        for activation in Activation::ALL.into_iter().skip(1) {
            t.add(format!("activation {activation:?} {rows}x{cols}"), move |s| {
                let x = s.leaf("x", [rows, cols])?;
                s.b.activation(x, activation)
            });
        }
        for activation in Activation::ALL {
            t.add(format!("glu {activation:?} {rows}x{cols}"), move |s| {
                let (gate, up) = (s.leaf("gate", [rows, cols])?, s.leaf("up", [rows, cols])?);
                s.b.glu(gate, up, activation)
            });
        }
        t.add(format!("add {rows}x{cols}"), move |s| {
            let (x, y) = (s.leaf("x", [rows, cols])?, s.leaf("y", [rows, cols])?);
            s.b.add(x, y)
        });
        t.add(format!("scale 2.5 {rows}x{cols}"), move |s| {
            let x = s.leaf("x", [rows, cols])?;
            s.b.scale(x, 2.5)
        });
        t.add(format!("dropout 0.2 {rows}x{cols}"), move |s| {
            let x = s.leaf("x", [rows, cols])?;
            s.b.dropout(x, 0.2)
        });
    }
}

fn transposes(t: &mut Table) {
    // Packs that come from one place, and rows that are not aligned; more than a block.
    for (by, rows, cols) in [(1, 18, 8), (0, 1, 264), (-3, 19, 129), (1, 18, 3), (7, 40, 24)] {
        t.add(format!("shift by {by} to {rows} rows of {cols}"), move |s| {
            let x = s.leaf("x", [5, 17, cols])?;
            s.b.shift(x, by, rows)
        });
    }
    // Tiles that are full and ragged, units of every width, axes too short for a tile, as many axes as kernels take.
    for (axes, order) in [
        (vec![64, 64], vec![1, 0]),
        (vec![65, 33], vec![1, 0]),
        (vec![2, 17, 127], vec![0, 2, 1]),
        (vec![2, 100, 3], vec![0, 2, 1]),
        (vec![2, 5, 3, 16], vec![0, 2, 1, 3]),
        (vec![2, 5, 3, 6], vec![0, 2, 1, 3]),
        (vec![3, 17, 2, 33], vec![3, 0, 2, 1]),
        (vec![17, 2, 3, 2, 2, 18], vec![5, 3, 2, 4, 1, 0]),
    ] {
        t.add(format!("transpose {axes:?} by {order:?}"), move |s| {
            let x = s.leaf("x", Shape(axes.clone()))?;
            s.b.transpose(x, &order)
        });
    }
}
