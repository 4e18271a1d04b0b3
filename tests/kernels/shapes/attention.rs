//! Attention: lengths around a tile, widths that are no multiple of one, shared heads, masks, one key.

use crate::cases::Table;
use hydra::base::DType;
use hydra::graph::AttentionOptions;

/// Adds the cases.
pub fn cases(t: &mut Table) {
    // Tails of tiles of 64 and of 128, heads that share keys, widths that kernels are made for and widths that none is.
    for (b, queries, keys, heads, kv_heads, width, causal, masked, dropout) in [
        (1, 1, 1, 1, 1, 64, true, false, 0.0),
        (2, 33, 33, 2, 1, 32, true, true, 0.0),
        (1, 65, 65, 2, 2, 64, true, false, 0.1),
        (1, 129, 70, 2, 1, 16, false, true, 0.0),
        (2, 63, 130, 2, 2, 8, true, false, 0.3),
        (1, 130, 129, 1, 1, 128, false, false, 0.0),
        (1, 197, 197, 1, 1, 48, false, false, 0.2),
        (1, 127, 65, 3, 1, 33, true, true, 0.1),
        (1, 66, 66, 2, 2, 96, true, false, 0.0),
        (1, 66, 70, 1, 1, 96, false, true, 0.1),
        (1, 70, 66, 2, 1, 128, true, false, 0.2),
        (1, 7, 67, 1, 1, 130, false, true, 0.0),
        (1, 257, 257, 1, 1, 24, true, false, 0.0),
        (1, 300, 300, 2, 1, 64, true, false, 0.0),
        (2, 70, 260, 2, 1, 64, false, true, 0.0),
        (1, 200, 200, 4, 2, 128, true, true, 0.0),
        (1, 140, 330, 3, 1, 128, true, false, 0.0),
        // More parts than the emulator has multiprocessors, with two and three groups of 64 queries.
        (3, 197, 197, 1, 1, 64, false, false, 0.0),
        (1, 260, 260, 3, 1, 64, true, true, 0.0),
        (1, 330, 100, 3, 1, 64, true, false, 0.0),
    ] {
        for packed in [false, true] {
            // With a single key the weights are 1 whatever q and k are: their gradients are what is left of sums that
            // cancel, and can be compared beside those of v alone.
            if packed && queries != keys || !packed && keys == 1 {
                continue;
            }
            let name = format!(
                "attention {b}x{queries} on {keys}, {heads} of {kv_heads} heads of {width}, packed {packed}, causal {causal}, masked {masked}, dropout {dropout}"
            );
            t.add(name, move |s| {
                let options = AttentionOptions { heads, kv_heads, scale: None, causal, dropout };
                let mask = if masked { Some(s.b.input("mask", [b, keys], DType::I32)?) } else { None };
                if packed {
                    let qkv = s.leaf("qkv", [b, queries, (heads + 2 * kv_heads) * width])?;
                    return s.b.attention_packed(qkv, mask, options);
                }
                let q = s.leaf("q", [b, queries, heads * width])?;
                let k = s.leaf("k", [b, keys, kv_heads * width])?;
                let v = s.leaf("v", [b, keys, kv_heads * width])?;
                s.b.attention(q, k, v, mask, options)
            });
        }
    }
    // Masks that hide whole tiles of 64 and of 128 keys, first, last and in between, with holes elsewhere; and what
    // stands behind a sequence's end.
    for (mask, b, queries, keys, heads, kv_heads, width, causal, dropout) in [
        ("tiles", 2, 70, 330, 2, 1, 64, false, 0.0),
        ("tiles", 2, 70, 330, 1, 1, 128, false, 0.0),
        ("lengths", 3, 150, 150, 1, 1, 128, true, 0.0),
        ("lengths", 3, 150, 150, 1, 1, 64, true, 0.0),
        ("tiles", 2, 33, 269, 1, 1, 96, false, 0.1),
        ("tiles", 2, 33, 269, 2, 1, 32, false, 0.0),
        ("lengths", 3, 66, 66, 1, 1, 33, false, 0.0),
        ("tiles", 2, 33, 269, 1, 1, 24, false, 0.1),
    ] {
        let name = format!(
            "attention {b}x{queries} on {keys}, {heads} of {kv_heads} heads of {width}, causal {causal}, masked by {mask}, dropout {dropout}"
        );
        t.add(name, move |s| {
            let options = AttentionOptions { heads, kv_heads, scale: None, causal, dropout };
            let mask = s.b.input(mask, [b, keys], DType::I32)?;
            let q = s.leaf("q", [b, queries, heads * width])?;
            let k = s.leaf("k", [b, keys, kv_heads * width])?;
            let v = s.leaf("v", [b, keys, kv_heads * width])?;
            s.b.attention(q, k, v, Some(mask), options)
        });
    }
    // Two in one program: what blocks share out their work by is as the first found it.
    t.add("attention of attention".to_string(), |s| {
        let options = AttentionOptions { heads: 3, kv_heads: 1, scale: None, causal: true, dropout: 0.0 };
        let q = s.leaf("q", [2, 130, 3 * 64])?;
        let k = s.leaf("k", [2, 130, 64])?;
        let v = s.leaf("v", [2, 130, 64])?;
        let between = s.b.attention(q, k, v, None, options)?;
        s.b.attention(between, k, v, None, options)
    });
}
