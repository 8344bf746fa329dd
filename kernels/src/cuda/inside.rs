//! What tests hold against the C++ compiler's own, as the text that programs of `cu/emulate` print.

use std::mem::offset_of;

use super::arguments::{
    AdamWArgs, AttentionArgs, BoundsArgs, ColumnsArgs, DampingArgs, DropoutArgs, GatherArgs, HeadsArgs,
    LossArgs, MlpArgs, NormArgs, Operand, RopeArgs, RowsArgs, ScatterArgs, SumArgs,
};
use super::attention::sizes::{Sizes, WIDTHS};

macro_rules! layout {
    ($type:ident: $($field:ident)*) => {{
        let fields = [$(format!("{} {}", stringify!($field), offset_of!($type, $field))),*];
        format!("{} {} {}", stringify!($type), size_of::<$type>(), fields.join(" "))
    }};
}

/// Sizes of the structs that kernels take, and where their fields lie (`cu/emulate/layout.cpp`).
pub fn layouts() -> Vec<String> {
    vec![
        layout!(Operand: data row entry head),
        layout!(AttentionArgs: q k v d_out document_k document_v prefix lengths lo hi slopes positions out lse delta
            dq dk dv entries heads kv_heads width scale),
        layout!(BoundsArgs: pattern size batch entries lengths offsets segments prefix floor document lo hi),
        layout!(RopeArgs: x cos sin entries positions heads width rotated direction),
        layout!(DampingArgs: y gradient omega_squared sums entries positions heads width bands),
        layout!(NormArgs: x gain bias y gradient dx partials rows width rows_per_block eps),
        layout!(LossArgs: logits targets teacher scales losses vocab cap),
        layout!(AdamWArgs: p g m v count decay beta1 beta2 step_size root_scale eps gradient_scale ids touched width
            step_untouched),
        layout!(RowsArgs: x y count width factor),
        layout!(SumArgs: g z norms partials sum rows width rows_per_piece pieces),
        layout!(HeadsArgs: fused q k v heads width),
        layout!(MlpArgs: gate up out gradient count activation),
        layout!(GatherArgs: table ids out count width),
        layout!(ScatterArgs: rows table ids starts places width),
        layout!(DropoutArgs: x y count first seed threshold),
        layout!(ColumnsArgs: x c y count width add),
    ]
}

/// Tiles, threads and shared memory of the attention kernels (`cu/emulate/shared.cpp`).
pub fn tiles() -> Vec<String> {
    let line = |(name, bytes, width): (&str, usize, usize)| {
        let s = Sizes::new(bytes, width);
        let (forward, backward) = (s.forward_warps(), s.backward_warps());
        let largest = [s.forward_bytes(forward), s.queries_bytes(backward), s.keys_bytes(backward)];
        let tiles = [s.forward_bytes(1), s.forward_queries(), s.parts(), forward, backward];
        let numbers: Vec<String> = largest.iter().chain(&tiles).map(usize::to_string).collect();
        format!("{name} {width} {}", numbers.join(" "))
    };
    let of = |name, bytes| WIDTHS.map(|width| (name, bytes, width));
    of("16bit", 2).into_iter().chain(of("f32", 4)).map(line).collect()
}
