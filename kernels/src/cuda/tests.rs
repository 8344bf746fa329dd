//! What only this crate can see: layouts and sizes against the C++ compiler's, the compiler's refusals.

use std::mem::offset_of;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::arguments::*;
use super::attention::sizes::{Sizes, WIDTHS};
use super::error::CudaError;
use super::nvrtc::{Nvrtc, Source};

#[path = "../../tests/cuda_device/compiler.rs"]
mod compiler;

/// What a program of `cu/emulate` prints.
fn printed(name: &str) -> Result<Option<String>> {
    let Some(compiler) = compiler::compiler() else { return Ok(None) };
    let folder = tempfile::tempdir()?;
    let program = folder.path().join(name);
    compiler::compile(&compiler, name, &[], &program)?;
    let ran = Command::new(&program).output().with_context(|| program.display().to_string())?;
    ensure!(ran.status.success(), "{name}: {}", ran.status);
    Ok(Some(String::from_utf8(ran.stdout)?))
}

macro_rules! layout {
    ($type:ident { $($field:ident),* }) => {{
        let fields = [$((stringify!($field), offset_of!($type, $field))),*];
        let fields: Vec<String> = fields.iter().map(|(name, at)| format!("{name} {at}")).collect();
        format!("{} {} {}", stringify!($type), size_of::<$type>(), fields.join(" "))
    }};
}

#[test]
fn arguments_lie_as_in_the_kernels() -> Result<()> {
    let Some(theirs) = printed("layout")? else { return Ok(()) };
    let ours = [
        layout!(Operand { data, row, entry, head }),
        layout!(AttentionArgs {
            q,
            k,
            v,
            d_out,
            document_k,
            document_v,
            prefix,
            lengths,
            lo,
            hi,
            slopes,
            positions,
            out,
            lse,
            delta,
            dq,
            dk,
            dv,
            entries,
            heads,
            kv_heads,
            width,
            scale
        }),
        layout!(BoundsArgs {
            pattern,
            size,
            batch,
            entries,
            lengths,
            offsets,
            segments,
            prefix,
            floor,
            document,
            lo,
            hi
        }),
        layout!(RopeArgs { x, cos, sin, entries, positions, heads, width, rotated, direction }),
        layout!(DampingArgs { y, gradient, omega_squared, sums, entries, positions, heads, width, bands }),
        layout!(NormArgs { x, gain, bias, y, gradient, dx, partials, rows, width, rows_per_block, eps }),
        layout!(LossArgs { logits, targets, teacher, scales, losses, vocab, cap }),
        layout!(AdamWArgs {
            p,
            g,
            m,
            v,
            count,
            decay,
            beta1,
            beta2,
            step_size,
            root_scale,
            eps,
            gradient_scale,
            ids,
            touched,
            width,
            step_untouched
        }),
    ];
    assert_eq!(theirs.trim().lines().collect::<Vec<_>>(), ours);
    Ok(())
}

#[test]
fn shared_memory_is_that_of_the_kernels() -> Result<()> {
    let Some(theirs) = printed("shared")? else { return Ok(()) };
    let mut ours = Vec::new();
    for (name, bytes) in [("16bit", 2), ("f32", 4)] {
        for width in WIDTHS {
            let s = Sizes::new(bytes, width);
            let (forward, backward) = (s.forward_warps(), s.backward_warps());
            ours.push(format!(
                "{name} {width} {} {} {} {} {} {} {forward} {backward}",
                s.forward_bytes(forward),
                s.queries_bytes(backward),
                s.keys_bytes(backward),
                s.forward_bytes(1),
                s.forward_queries(),
                s.parts(),
            ));
        }
    }
    let theirs: Vec<String> =
        theirs.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(theirs, ours);
    Ok(())
}

#[test]
fn without_a_fitting_compiler_the_error_says_what_was_tried() {
    let error = Nvrtc::open(11, "sm_90").err().expect("NVRTC of CUDA 12 is too new for a driver of 11");
    let text = error.to_string();
    assert!(matches!(error, CudaError::NoCompiler { .. }), "{text}");
    assert!(text.starts_with("CUDA: no machine code for sm_90: the library was built without it"), "{text}");
    assert!(text.contains("expected libnvrtc of CUDA 12.0 to 11 (tried: libnvrtc.so.12: "), "{text}");
}

#[test]
fn a_source_that_does_not_compile_comes_back_with_the_log() -> Result<()> {
    let nvrtc = match Nvrtc::open(99, "sm_90") {
        Ok(nvrtc) => nvrtc,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    let source = Source { name: "bad.cu", text: "#include \"a.cuh\"\nint x = y;", headers: &[("a.cuh", "")] };
    let error = nvrtc.compile(source, &["--gpu-architecture=sm_90".into()], "sm_90").err();
    let text = error.context("`y` is not there")?.to_string();
    ensure!(text.contains("bad.cu for sm_90") && text.contains("identifier \"y\" is undefined"), "{text}");
    Ok(())
}
