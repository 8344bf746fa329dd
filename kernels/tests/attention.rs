//! The attention op against the f64 reference, finite differences, and the golden shifted sparse case.

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use megacontext_kernels::attention::{Pattern, Rows, alibi_slopes, attention};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::store::bf16;
use support::{BOTH, Case, SHIFTED, SHIFTED_BOTH, WINDOW, close, flat, random, stored, wide, widened};

#[test]
fn equals_the_reference_for_odd_lengths_and_heads() -> Result<()> {
    for [heads, kv_heads] in [[3, 1], [5, 5], [4, 2], [1, 1]] {
        for entries in [1, 2, 7, 33, 129] {
            let both_ways = [Pattern::Bidirectional, SHIFTED_BOTH(8), SHIFTED_BOTH(5), SHIFTED_BOTH(2)];
            for pattern in [Pattern::Dense, SHIFTED(8), SHIFTED(5), SHIFTED(2)].into_iter().chain(both_ways) {
                Case::new([1, entries, heads, kv_heads, 12], pattern).check()?;
            }
        }
    }
    Ok(())
}

#[test]
fn equals_the_reference_across_tiles_and_blocks() -> Result<()> {
    let patterns = [
        Pattern::Dense,
        SHIFTED(200),
        SHIFTED(301),
        SHIFTED(16),
        WINDOW(130),
        Pattern::Bidirectional,
        SHIFTED_BOTH(200),
        SHIFTED_BOTH(301),
    ];
    for pattern in patterns {
        Case::new([1, 777, 3, 1, 8], pattern).check()?;
        Case::new([1, 520, 4, 2, 12], pattern).check_stored::<bf16>()?;
    }
    Case::new([1, 1300, 2, 2, 4], Pattern::Dense).check()
}

#[test]
fn equals_the_reference_at_every_kind_of_width() -> Result<()> {
    for width in [1, 2, 3, 17, 64, 96, 255, 256] {
        Case::new([1, 40, 2, 1, width], SHIFTED(12)).check()?;
    }
    Ok(())
}

#[test]
fn rows_of_different_lengths() -> Result<()> {
    for pattern in [Pattern::Dense, SHIFTED(10), Pattern::Bidirectional, SHIFTED_BOTH(10)] {
        let case = Case::new([2, 45, 3, 1, 8], pattern).lengths(&[45, 19]);
        case.check()?;
        let out = case.run(&case.inputs()?)?;
        let past = flat(&out.narrow(0, 1, 1)?.narrow(1, 19, 26)?)?;
        assert!(past.iter().all(|x| *x == 0.0), "{pattern:?}: rows past the length are zero");
    }
    Ok(())
}

#[test]
fn packed_segments() -> Result<()> {
    for pattern in [Pattern::Dense, SHIFTED(10), Pattern::Bidirectional, SHIFTED_BOTH(10)] {
        Case::new([2, 300, 4, 2, 8], pattern).segments(&[&[0, 7, 8, 130, 299], &[0]]).check()?;
        Case::new([2, 60, 3, 3, 8], pattern).segments(&[&[0, 31], &[0, 5, 50]]).lengths(&[40, 50]).check()?;
    }
    Ok(())
}

#[test]
fn a_segment_is_its_own_row() -> Result<()> {
    for pattern in [Pattern::Dense, Pattern::Bidirectional] {
        let packed = Case::new([1, 50, 2, 1, 8], pattern).segments(&[&[0, 20]]);
        let inputs = packed.inputs()?;
        let [q, k, v] = &inputs;
        let whole = packed.run(&inputs)?.narrow(1, 20, 30)?;
        let alone = [q.narrow(1, 20, 30)?, k.narrow(1, 20, 30)?, v.narrow(1, 20, 30)?];
        let alone = Case::new([1, 30, 2, 1, 8], pattern).run(&alone)?;
        close("segment", &wide(&whole)?, &wide(&alone)?, 1e-6);
    }
    Ok(())
}

#[test]
fn rows_of_length_zero() -> Result<()> {
    for pattern in [Pattern::Dense, SHIFTED(4), Pattern::Bidirectional, SHIFTED_BOTH(4)] {
        Case::new([2, 9, 3, 1, 4], pattern).lengths(&[0, 9]).check()?;
        let case = Case::new([2, 9, 3, 1, 4], pattern).lengths(&[0, 0]);
        let inputs = case.inputs()?;
        assert!(flat(&case.run(&inputs)?)?.iter().all(|x| *x == 0.0));
        for gradient in case.gradients(&inputs, &random(&case.q_dims(), 4)?)? {
            assert!(flat(&gradient)?.iter().all(|x| *x == 0.0));
        }
    }
    Ok(())
}

#[test]
fn no_entries_at_all() -> Result<()> {
    let case = Case::new([2, 0, 3, 1, 4], Pattern::Dense);
    assert_eq!(case.run(&case.inputs()?)?.dims(), [2, 0, 3, 4]);
    Ok(())
}

#[test]
fn a_group_of_the_whole_row_is_dense() -> Result<()> {
    for group in [37, 38, 60, 1000] {
        for (shifted, whole) in [(SHIFTED, Pattern::Dense), (SHIFTED_BOTH, Pattern::Bidirectional)] {
            let shifted = Case::new([2, 37, 5, 5, 8], shifted(group)).lengths(&[37, 12]);
            let dense = Case { pattern: whole, ..shifted.clone() };
            let inputs = shifted.inputs()?;
            assert_eq!(flat(&shifted.run(&inputs)?)?, flat(&dense.run(&inputs)?)?, "group {group}");
        }
    }
    Ok(())
}

#[test]
fn finite_differences() -> Result<()> {
    for pattern in [Pattern::Dense, SHIFTED(6), WINDOW(5), Pattern::Bidirectional, SHIFTED_BOTH(6)] {
        let case = Case::new([2, 13, 3, 1, 4], pattern)
            .lengths(&[13, 9])
            .segments(&[&[0, 4], &[0]])
            .slopes(&[0.3, 0.0, 0.05]);
        let inputs = case.inputs()?;
        let probe = random(&case.q_dims(), 4)?;
        let gradients = case.gradients(&inputs, &probe)?;
        let value = |inputs: &[Tensor; 3]| -> Result<f64> {
            Ok(wide(&case.run(inputs)?)?.iter().zip(wide(&probe)?).map(|(o, p)| o * p).sum())
        };
        for (which, name) in ["q", "k", "v"].iter().enumerate() {
            let analytic = flat(&gradients[which])?;
            let base = flat(&inputs[which])?;
            for at in (0..base.len()).step_by(7) {
                let moved = |step: f32| -> Result<f64> {
                    let mut values = base.clone();
                    values[at] += step;
                    let mut inputs = inputs.clone();
                    inputs[which] = Tensor::from_vec(values, inputs[which].dims(), &Device::Cpu)?;
                    value(&inputs)
                };
                let step = 1e-2;
                let numeric = (moved(step)? - moved(-step)?) / f64::from(2.0 * step);
                let analytic = f64::from(analytic[at]);
                assert!(
                    (numeric - analytic).abs() < 2e-3,
                    "{pattern:?} {name}[{at}]: expected {numeric}, got {analytic}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn strided_operands() -> Result<()> {
    let case = Case::new([2, 21, 4, 2, 8], SHIFTED(6)).lengths(&[21, 17]);
    let [q, k, v] = case.inputs()?;
    // [B, H, T, D] in memory; a slice of a wider tensor; D outermost.
    let q_strided = q.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    let k_strided = Tensor::cat(&[&v, &k, &q.narrow(2, 0, 2)?], 3)?.narrow(3, 8, 8)?;
    let v_strided = v.permute((3, 0, 1, 2))?.contiguous()?.permute((1, 2, 3, 0))?;
    for tensor in [&q_strided, &k_strided, &v_strided] {
        assert!(!tensor.is_contiguous());
    }
    let strided = [q_strided.clone(), k_strided.clone(), v_strided.clone()];
    close("strided", &wide(&case.run(&strided)?)?, &wide(&case.run(&[q, k, v])?)?, 1e-6);
    // The backward pass reads the strided operands too.
    let vars = [Var::from_tensor(&q_strided)?, Var::from_tensor(&k_strided)?, Var::from_tensor(&v_strided)?];
    let views = [
        vars[0].transpose(1, 2)?.contiguous()?.transpose(1, 2)?,
        Tensor::cat(&[vars[2].as_tensor(), vars[1].as_tensor()], 3)?.narrow(3, 8, 8)?,
        vars[2].permute((3, 0, 1, 2))?.contiguous()?.permute((1, 2, 3, 0))?,
    ];
    let probe = random(&case.q_dims(), 4)?;
    let grads = (case.run(&views)? * &probe)?.sum_all()?.backward()?;
    let want = case.gradients(&strided, &probe)?;
    for (var, want) in vars.iter().zip(&want) {
        let got = grads.get(var).expect("a gradient");
        close("strided gradient", &wide(got)?, &wide(want)?, 1e-5);
    }
    Ok(())
}

#[test]
fn a_broadcast_gradient() -> Result<()> {
    let case = Case::new([2, 21, 3, 1, 8], Pattern::Dense);
    let inputs = case.inputs()?;
    let want = case.gradients(&inputs, &Tensor::ones(&case.q_dims(), DType::F32, &Device::Cpu)?)?;
    let vars = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let views = [vars[0].as_tensor().clone(), vars[1].as_tensor().clone(), vars[2].as_tensor().clone()];
    // The gradient of a sum is one value with strides of zero.
    let grads = case.run(&views)?.sum_all()?.backward()?;
    for (var, want) in vars.iter().zip(&want) {
        assert_eq!(flat(grads.get(var).expect("a gradient"))?, flat(want)?);
    }
    Ok(())
}

#[test]
fn one_tensor_in_all_three_places() -> Result<()> {
    let case = Case::new([1, 19, 2, 2, 4], Pattern::Dense);
    let x = random(&case.q_dims(), 1)?;
    let probe = random(&case.q_dims(), 4)?;
    let var = Var::from_tensor(&x)?;
    let out = case.run(&[var.as_tensor().clone(), var.as_tensor().clone(), var.as_tensor().clone()])?;
    let grads = (out * &probe)?.sum_all()?.backward()?;
    let [q, k, v] = case.gradients(&[x.clone(), x.clone(), x], &probe)?;
    close("sum", &wide(grads.get(&var).expect("a gradient"))?, &wide(&((q + k)? + v)?)?, 1e-5);
    Ok(())
}

#[test]
fn a_constant_operand_gets_no_gradient() -> Result<()> {
    let case = Case::new([1, 19, 2, 2, 4], Pattern::Dense);
    let [q, k, v] = case.inputs()?;
    let var = Var::from_tensor(&q)?;
    let grads = case.run(&[var.as_tensor().clone(), k.clone(), v.clone()])?.sum_all()?.backward()?;
    assert!(grads.get(&var).is_some());
    assert!(grads.get(&k).is_none() && grads.get(&v).is_none());
    Ok(())
}

#[test]
fn the_same_bytes_whatever_the_threads() -> Result<()> {
    let rows = |case: Case| case.lengths(&[700, 650]);
    for pattern in [Pattern::Dense, SHIFTED(256), WINDOW(100), Pattern::Bidirectional] {
        for products in BOTH {
            let case = rows(Case::new([2, 700, 6, 2, 16], pattern));
            let operands = case.operands();
            let first = case.outcome::<f32>(&operands, products)?;
            let first_bf16 = case.outcome::<bf16>(&operands, products)?;
            for threads in [1, 2, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
                let again = pool.install(|| case.outcome::<f32>(&operands, products))?;
                assert!(again == first, "{pattern:?} {products:?}, {threads} threads");
                let again = pool.install(|| case.outcome::<bf16>(&operands, products))?;
                assert!(again == first_bf16, "{pattern:?} {products:?} bf16, {threads} threads");
            }
        }
    }
    Ok(())
}

#[test]
fn operands_of_bf16_give_a_result_and_gradients_of_bf16() -> Result<()> {
    let case = Case::new([2, 45, 4, 2, 24], SHIFTED(10)).lengths(&[45, 19]);
    let inputs = case.inputs()?.map(|x| x.to_dtype(DType::BF16));
    let [q, k, v] = inputs;
    let inputs = [q?, k?, v?];
    let probe = random(&case.q_dims(), 4)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
    let out = case.run(&inputs)?;
    let gradients = case.gradients(&inputs, &probe)?;
    // The same on slices, rounded once.
    let mut operands = case.operands();
    operands[3] = flat(&probe)?;
    let want = case.outcome::<bf16>(&operands, Products::F32)?;
    for (got, want) in std::iter::once((&out, widened(&want.out)))
        .chain(gradients.iter().zip(want.gradients.iter().map(|g| widened(&stored::<bf16>(g)))))
    {
        assert_eq!(got.dtype(), DType::BF16);
        assert_eq!(wide(&got.to_dtype(DType::F32)?)?, want);
    }
    Ok(())
}

#[test]
fn slopes_are_those_of_the_paper() {
    assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
    // The authors' code for 6 heads: those of 4, then the first and third of 8.
    assert_eq!(alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]);
    assert_eq!(alibi_slopes(1), [0.00390625]);
}

#[test]
fn slopes_lower_scores_by_distance() -> Result<()> {
    for pattern in [Pattern::Dense, SHIFTED(90), WINDOW(70), Pattern::Bidirectional] {
        Case::new([2, 333, 6, 2, 8], pattern).lengths(&[333, 100]).slopes(&alibi_slopes(6)).check()?;
    }
    // By hand: equal scores but for the distance, so probabilities are those of e^(−slope·distance).
    let case = Case::new([1, 3, 1, 1, 1], Pattern::Dense).slopes(&[2f32.ln()]);
    let got = case
        .outcome::<f32>(&[vec![0.0; 3], vec![0.0; 3], vec![1.0, 10.0, 100.0], vec![0.0; 3]], Products::F32)?;
    let want = [1.0, (1.0 * 0.5 + 10.0) / 1.5, (1.0 * 0.25 + 10.0 * 0.5 + 100.0) / 1.75];
    close("by hand", &widened(&got.out), &want, 1e-4);
    Ok(())
}

#[test]
fn a_window_of_the_whole_row_is_dense() -> Result<()> {
    for window in [37, 38, 1000] {
        let case = Case::new([2, 37, 5, 5, 8], WINDOW(window)).lengths(&[37, 12]);
        let dense = Case { pattern: Pattern::Dense, ..case.clone() };
        for products in BOTH {
            let operands = case.operands();
            assert_eq!(case.outcome::<f32>(&operands, products)?, dense.outcome::<f32>(&operands, products)?);
        }
    }
    Ok(())
}

#[test]
fn the_golden_shifted_sparse_case() -> Result<()> {
    let path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../integration-tests/fixtures/megacontext/s2attn.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
    // The file is [B, H, T, D].
    let get = |name: &str| -> Result<Tensor> { Ok(tensors[name].transpose(1, 2)?) };
    let (q, k, v) = (get("in.q")?, get("in.k")?, get("in.v")?);
    let (q, k, v) = (Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?);
    let scale = 1.0 / (q.dim(3)? as f64).sqrt();
    let out = attention(&q, &k, &v, scale, SHIFTED(8), &Rows::default())?;
    close("result", &wide(&out)?, &wide(&get("derived.nowrap.out")?)?, 2e-5);
    let grads = (out * get("in.probe")?)?.sum_all()?.backward()?;
    for (name, var) in [("q", &q), ("k", &k), ("v", &v)] {
        let want = wide(&get(&format!("derived.nowrap.grad.{name}"))?)?;
        let size = want.iter().fold(0f64, |most, x| most.max(x.abs()));
        close(name, &wide(grads.get(var).expect("a gradient"))?, &want, 1e-4 * size);
    }
    Ok(())
}

#[test]
fn the_reference_sees_what_the_golden_mask_says() -> Result<()> {
    use megacontext_kernels::attention::reference::sees;
    let path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../integration-tests/fixtures/megacontext/s2attn.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
    let mask = tensors["derived.nowrap.mask"].to_vec3::<u8>()?;
    let case = Case::new([1, 32, 4, 4, 8], SHIFTED(8));
    for h in 0..4 {
        for i in 0..32 {
            for j in 0..32 {
                let sees = sees(&case.sizes, case.pattern, &case.rows, 0, h, i, j);
                assert_eq!(sees, mask[h][i][j] != 0, "head {h}, query {i}, key {j}");
            }
        }
    }
    Ok(())
}
