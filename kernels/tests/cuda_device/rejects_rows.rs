//! What rows, activations and embeddings refuse.

use anyhow::Result;
use half::{bf16, f16};
use megacontext_kernels::cuda::mlp::Activation;
use megacontext_kernels::cuda::{embedding, mlp, rows};

use super::refused;
use crate::support::device;

rejects! {
    rows_of_another_length(device) {
        let (x, mut y) = (device.zeros::<f32>(8)?, device.zeros::<f32>(7)?);
        refused(rows::convert(device, &x, &mut y), "cuda rows: expected y of 8 values, got 7")?;
        refused(rows::add_assign(device, &x, &mut y), "cuda rows: expected y of 8 values, got 7")
    }
    rows_between_two_16_bit_types(device) {
        let (x, mut y) = (device.zeros::<bf16>(8)?, device.zeros::<f16>(8)?);
        let expected = "cuda rows: expected y stored as x is, or one of the two in f32, got bf16 to f16";
        refused(rows::convert(device, &x, &mut y), expected)?;
        refused(rows::add_assign(device, &x, &mut y), expected)?;
        let expected = "cuda rows: expected y stored as the bias is, or one of the two in f32, got bf16 to f16";
        refused(rows::fill(device, &x, &mut y), expected)?;
        refused(rows::add_bias(device, &x, &mut y), expected)
    }
    a_bias_beside_part_of_a_row(device) {
        let (bias, mut y) = (device.zeros::<f32>(3)?, device.zeros::<f32>(8)?);
        let expected = "cuda rows: expected y of whole rows of 3 values, at least one value in each, got 8 values";
        refused(rows::fill(device, &bias, &mut y), expected)?;
        refused(rows::add_bias(device, &bias, &mut y), expected)
    }
    a_bias_of_nothing(device) {
        let (bias, mut y) = (device.zeros::<f32>(3)?, device.zeros::<f32>(8)?);
        refused(rows::fill(device, &bias.slice(..0), &mut y),
            "cuda rows: expected y of whole rows of 0 values, at least one value in each, got 8 values")
    }
    a_sum_over_part_of_a_row(device) {
        let (g, mut sum) = (device.zeros::<f32>(8)?, device.zeros::<f32>(3)?);
        refused(rows::sum_rows(device, &g, &mut sum),
            "cuda rows: expected g of whole rows of 3 values, at least one value in each, got 8 values")
    }
    fused_heads_of_part_of_an_entry(device) {
        let (fused, part) = (device.zeros::<f32>(13)?, device.zeros::<f32>(4)?);
        let mut parts = [device.zeros::<f32>(4)?, device.zeros::<f32>(4)?, device.zeros::<f32>(4)?];
        let [mut q, mut k, mut v] = parts.each_mut().map(|part| part.as_view_mut());
        let expected = "cuda rows: expected fused heads of whole rows of 12 values, at least one value in each, got 13 values";
        refused(rows::split_heads(device, &fused, 2, 2, [&mut q, &mut k, &mut v]), expected)?;
        let mut fused = fused;
        let part = part.as_view();
        refused(rows::join_heads(device, [&part; 3], 2, 2, &mut fused), expected)
    }
    parts_of_heads_of_another_size(device) {
        let mut fused = device.zeros::<f32>(12)?;
        let mut parts = [device.zeros::<f32>(4)?, device.zeros::<f32>(5)?, device.zeros::<f32>(4)?];
        let [mut q, mut k, mut v] = parts.each_mut().map(|part| part.as_view_mut());
        refused(rows::split_heads(device, &fused, 2, 2, [&mut q, &mut k, &mut v]),
            "cuda rows: expected keys of 4 values, got 5")?;
        let [q, k, v] = parts.each_ref().map(|part| part.as_view());
        refused(rows::join_heads(device, [&q, &v, &k], 2, 2, &mut fused),
            "cuda rows: expected values of 4 values, got 5")
    }

    an_activation_with_a_gate_too_many_or_too_few(device) {
        let (mut up, mut gate, g) = (device.zeros::<f32>(8)?, device.zeros::<f32>(8)?, device.zeros::<f32>(8)?);
        let mut out = device.zeros::<f32>(8)?;
        let view = gate.as_view();
        refused(mlp::forward(device, Activation::Relu2, Some(&view), &up.as_view(), &mut out.as_view_mut()),
            "cuda mlp: expected no gate for Relu2, got a gate")?;
        refused(mlp::forward(device, Activation::SwiGlu, None, &up.as_view(), &mut out.as_view_mut()),
            "cuda mlp: expected a gate for SwiGlu, got no gate")?;
        refused(mlp::backward_in_place(device, Activation::GeGlu, None, &mut up.as_view_mut(), &g.as_view()),
            "cuda mlp: expected a gate for GeGlu, got no gate")?;
        let mut view = gate.as_view_mut();
        refused(mlp::backward_in_place(device, Activation::Gelu, Some(&mut view), &mut up.as_view_mut(), &g.as_view()),
            "cuda mlp: expected no gate for Gelu, got a gate")
    }
    an_activation_of_sizes_that_differ(device) {
        let (mut up, mut gate, g) = (device.zeros::<f32>(8)?, device.zeros::<f32>(7)?, device.zeros::<f32>(9)?);
        let mut out = device.zeros::<f32>(6)?;
        let view = gate.as_view();
        refused(mlp::forward(device, Activation::SwiGlu, Some(&view), &up.as_view(), &mut out.as_view_mut()),
            "cuda mlp: expected the gate of 8 values, got 7")?;
        refused(mlp::forward(device, Activation::Gelu, None, &up.as_view(), &mut out.as_view_mut()),
            "cuda mlp: expected the result of 8 values, got 6")?;
        refused(mlp::backward_in_place(device, Activation::Gelu, None, &mut up.as_view_mut(), &g.as_view()),
            "cuda mlp: expected the gradient of the result of 8 values, got 9")?;
        let mut view = gate.as_view_mut();
        refused(mlp::backward_in_place(device, Activation::SwiGlu, Some(&mut view), &mut up.as_view_mut(), &g.as_view()),
            "cuda mlp: expected the gate of 8 values, got 7")
    }

    an_embedding_of_an_id_outside_the_table(device) {
        let (mut table, mut out) = (device.zeros::<f32>(12)?, device.zeros::<f32>(6)?);
        refused(embedding::gather(device, &table, 3, &[3, 4], &mut out),
            "cuda embedding: token id: expected below 4, got 4")?;
        refused(embedding::scatter_add(device, &out, 3, &[3, 4], &mut table),
            "cuda embedding: token id: expected below 4, got 4")
    }
    an_embedding_of_a_row_too_many(device) {
        let (mut table, mut out) = (device.zeros::<f32>(12)?, device.zeros::<f32>(6)?);
        refused(embedding::gather(device, &table, 3, &[3], &mut out),
            "cuda embedding: expected rows of 3 values, got 6")?;
        refused(embedding::scatter_add(device, &out, 3, &[3], &mut table),
            "cuda embedding: expected rows of 3 values, got 6")
    }
    an_embedding_of_part_of_a_row(device) {
        let (table, mut out) = (device.zeros::<f32>(13)?, device.zeros::<f32>(3)?);
        refused(embedding::gather(device, &table, 3, &[3], &mut out),
            "cuda embedding: expected the table of whole rows of 3 values, at least one value in each, got 13 values")
    }
    an_embedding_between_two_16_bit_types(device) {
        let (table, mut out) = (device.zeros::<f16>(12)?, device.zeros::<bf16>(3)?);
        refused(embedding::gather(device, &table, 3, &[3], &mut out),
            "cuda embedding: expected rows stored as the table is, or one of the two in f32, got f16 to bf16")
    }
}
