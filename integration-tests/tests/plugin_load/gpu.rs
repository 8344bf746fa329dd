//! Tensors of a GPU's memory, which a session on the processor refuses. Those of a session's own GPU are the test `gpu`'s of
//! `megacontext-lora`.

use megacontext_lora_abi::{ContextView, DType, EntriesView, ErrorKind, Stream, TensorView, TensorViewMut};

use super::open_on;

/// A view of a GPU's memory that nobody has.
pub fn on_gpu<'a>(dtype: DType, shape: &[usize], strides: &[isize]) -> TensorView<'a> {
    // SAFETY: the plugin refuses the view and follows no address; this is what the test shows.
    unsafe { TensorView::from_cuda(0x7f00_0000_0100, dtype, 0, Some(Stream::LEGACY_DEFAULT), shape, strides) }
}

#[test]
fn a_gpus_tensors_are_refused_before_anything_is_changed() {
    let (_folder, session) = open_on("cpu", "llama/tied_f32");
    let ids = [1u32, 5, 9];
    let width = session.describe().unwrap()["hidden_size"].as_u64().unwrap() as usize;
    let (mut embedded, mut losses) = (vec![7f32; 3 * width], [7f32; 3]);
    let (mut cos, mut logits) = ([7f32; 3 * 2], [7f32; 3 * 64]);
    // SAFETY: as in `on_gpu`.
    let out = |shape: &[usize], strides: &[isize]| unsafe {
        TensorViewMut::from_cuda(0x7f00_0000_1000, DType::F32, 0, None, shape, strides)
    };
    let tokens = on_gpu(DType::U32, &[3], &[1]);
    let places = on_gpu(DType::F64, &[3], &[1]);
    let mu = [0f64, 1.0, 2.0];
    let none: [f64; 0] = [];
    let context = ContextView::tokens(&ids);
    let entries = EntriesView::Embeddings(on_gpu(DType::F32, &[3, width], &[width as isize, 1]));
    let refused = [
        ("tokens", session.embed(tokens, TensorViewMut::new(&mut embedded, &[3, width]).unwrap())),
        ("out", session.embed(TensorView::of(&ids), out(&[3, width], &[width as isize, 1]))),
        ("out", session.logits(context, out(&[3, 64], &[64, 1]))),
        (
            "embeddings",
            session.logits(ContextView::new(entries), TensorViewMut::new(&mut logits, &[3, 64]).unwrap()),
        ),
        (
            "tokens",
            session.nll(ContextView::new(EntriesView::Tokens(tokens)), TensorViewMut::of(&mut losses)),
        ),
        ("mu", session.nll(context.with_mu(places), TensorViewMut::of(&mut losses))),
        ("sigma", session.nll(context.with_sigma(places), TensorViewMut::of(&mut losses))),
        ("lod", session.nll(context.with_lod(tokens), TensorViewMut::of(&mut losses))),
        ("targets", session.nll(context.with_targets(tokens), TensorViewMut::of(&mut losses))),
        (
            "out_sin",
            session.rope_tables(
                TensorView::of(&mu),
                TensorView::of(&none),
                TensorViewMut::new(&mut cos, &[3, 2]).unwrap(),
                out(&[3, 2], &[2, 1]),
            ),
        ),
    ];
    for (what, answer) in refused {
        let error = answer.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{what}: {error}");
        assert_eq!(error.message(), format!("{what}: expected memory on cpu, got cuda:0"));
    }
    assert!(embedded.iter().chain(&losses).chain(&cos).chain(&logits).all(|value| *value == 7.0));
    session.embed(TensorView::of(&ids), TensorViewMut::new(&mut embedded, &[3, width]).unwrap()).unwrap();
}
