//! One test per refusal, and the round trips.

use super::*;

fn raw<'a>(data: *const c_void, shape: &[usize], strides: &[isize]) -> TensorView<'a> {
    // SAFETY: these views are checked, and read only where the test says that the memory is there.
    unsafe { TensorView::from_raw_parts(data, DType::F32, Device::CPU, shape, strides) }
}

fn raw_mut<'a>(data: *mut c_void, shape: &[usize], strides: &[isize]) -> TensorViewMut<'a> {
    // SAFETY: as in `raw`.
    unsafe { TensorViewMut::from_raw_parts(data, DType::F32, Device::CPU, shape, strides) }
}

const ANY: [Option<usize>; 2] = [None, None];

#[test]
fn a_slice_is_read_in_place() {
    let values = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
    let view = TensorView::new(&values, &[2, 3]).unwrap();
    let read = view.read::<f32>("x", &[Some(2), None]).unwrap();
    assert!(matches!(read, Cow::Borrowed(_)));
    assert_eq!(read.as_ptr(), values.as_ptr());
    assert_eq!(&*read, &values);
}

#[test]
fn strides_are_followed() {
    let values = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
    let transposed = raw(values.as_ptr().cast(), &[3, 2], &[1, 3]);
    assert_eq!(&*transposed.read::<f32>("x", &ANY).unwrap(), &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    let broadcast = raw(values.as_ptr().cast(), &[2, 3], &[0, 1]);
    assert_eq!(&*broadcast.read::<f32>("x", &ANY).unwrap(), &[1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
}

#[test]
fn outputs_are_written_through_strides() {
    let mut buffer = [0f32; 8];
    let mut view = raw_mut(buffer.as_mut_ptr().cast(), &[2, 3], &[4, 1]);
    view.fill::<f32, _, TensorError>("out", &ANY, |v| {
        v.copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        Ok(())
    })
    .unwrap();
    assert_eq!(buffer, [1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0, 0.0]);
}

#[test]
fn nothing_is_spread_when_filling_fails() {
    let mut buffer = [7f32; 8];
    let mut view = raw_mut(buffer.as_mut_ptr().cast(), &[2, 3], &[4, 1]);
    let shared = TensorError::Null { what: "inner".into() };
    assert_eq!(view.fill::<f32, (), _>("out", &ANY, |_| Err(shared.clone())), Err(shared));
    assert_eq!(buffer, [7f32; 8]);
}

#[test]
fn memory_comes_as_runs_of_neighbours() {
    let cuda = Device { kind: DeviceKind::Cuda, id: 1 };
    let runs = |shape: &[usize], strides: &[isize]| {
        let view = on_gpu(ADDRESS, None, shape, strides);
        let runs = view.runs(cuda, "x", DType::F32, &vec![None; shape.len()]).unwrap();
        (runs.length(), runs.len(), runs.collect::<Vec<_>>())
    };
    // In one piece; a dimension of one is stepped over by nobody.
    assert_eq!(runs(&[2, 3], &[3, 1]), (6, 1, vec![0]));
    assert_eq!(runs(&[2, 1, 3], &[3, 99, 1]), (6, 1, vec![0]));
    assert_eq!(runs(&[], &[]), (1, 1, vec![0]));
    // Rows with something behind them, of matrices with something behind them.
    assert_eq!(runs(&[2, 2, 3], &[20, 4, 1]), (3, 4, vec![0, 4, 20, 24]));
    assert_eq!(runs(&[2, 2, 3], &[20, 3, 1]), (6, 2, vec![0, 20]));
    // Values apart, turned round, and one of them again and again.
    assert_eq!(runs(&[3], &[2]), (1, 3, vec![0, 2, 4]));
    assert_eq!(runs(&[2, 3], &[1, 2]), (1, 6, vec![0, 2, 4, 1, 3, 5]));
    assert_eq!(runs(&[3, 2], &[0, 1]), (2, 3, vec![0, 0, 0]));
    // Nothing, wherever the 0 stands.
    assert_eq!(runs(&[0, 3], &[3, 1]), (0, 0, vec![]));
    assert_eq!(runs(&[3, 0], &[1, 1]), (0, 0, vec![]));

    let view = on_gpu(ADDRESS, None, &[2, 3], &[3, 1]);
    let error = view.runs(Device::CPU, "x", DType::F32, &ANY).unwrap_err();
    assert_eq!(error.to_string(), "x: expected memory on cpu, got cuda:1");
    // SAFETY: as in `on_gpu`.
    let out = unsafe { TensorViewMut::from_cuda(ADDRESS, DType::F32, 1, None, &[2, 3], &[2, 1]) };
    assert!(matches!(out.runs(cuda, "out", DType::F32, &ANY), Err(TensorError::Overlap { .. })));
}

#[test]
fn refuses_another_rank() {
    let error = TensorView::of(&[1f32]).check("mu", DType::F32, &ANY).unwrap_err();
    assert_eq!(error.to_string(), "mu: expected 2 dimensions, got 1");
}

#[test]
fn refuses_a_rank_beyond_the_limit() {
    let data = [0f32];
    let seven = raw(data.as_ptr().cast(), &[1; 7], &[1; 7]);
    assert!(matches!(seven.check("x", DType::F32, &[None; 7]), Err(TensorError::Rank { got: 7, .. })));
    assert!(matches!(seven.check("x", DType::F32, &[None; 6]), Err(TensorError::Rank { got: 7, .. })));
    assert!(matches!(TensorView::new(&data, &[1; 7]), Err(TensorError::Rank { .. })));
}

#[test]
fn refuses_another_shape() {
    let error = TensorView::new(&[0f32; 6], &[2, 3]).unwrap().check("out", DType::F32, &[None, Some(4)]);
    assert_eq!(error.unwrap_err().to_string(), "out: expected the shape [any, 4], got [2, 3]");
}

#[test]
fn refuses_another_dtype() {
    let error = TensorView::of(&[1u32]).check("mu", DType::F64, &[None]).unwrap_err();
    assert_eq!(error.to_string(), "mu: expected F64, got U32");
}

#[test]
fn refuses_another_device() {
    let device = Device { kind: DeviceKind::Cuda, id: 1 };
    let data = [0f32; 2];
    // SAFETY: the view is only checked.
    let view = unsafe { TensorView::from_raw_parts(data.as_ptr().cast(), DType::F32, device, &[2], &[1]) };
    let error = view.check("x", DType::F32, &[None]).unwrap_err();
    assert_eq!(error.to_string(), "x: expected memory on cpu, got cuda:1");
}

/// Where a GPU's memory may be: no pointer of this process.
const ADDRESS: usize = 0x7f00_0000_0100;

fn on_gpu<'a>(address: usize, stream: Option<Stream>, shape: &[usize], strides: &[isize]) -> TensorView<'a> {
    // SAFETY: nothing follows the address: these views are looked at and refused.
    unsafe { TensorView::from_cuda(address, DType::F32, 1, stream, shape, strides) }
}

#[test]
fn a_gpus_view_carries_address_and_stream() {
    let stream = Stream::new(0x5555_0000).unwrap();
    let view = on_gpu(ADDRESS, Some(stream), &[2, 3], &[3, 1]);
    let cuda = Device { kind: DeviceKind::Cuda, id: 1 };
    assert_eq!((view.device(), view.address(), view.stream()), (cuda, ADDRESS, Some(stream)));
    assert_eq!((view.shape(), view.strides(), view.dtype()), (&[2, 3][..], &[3, 1][..], DType::F32));
    assert_eq!(view.memory(), Memory { device: cuda, bytes: ADDRESS..ADDRESS + 24 });
    view.check_on(cuda, "x", DType::F32, &[Some(2), Some(3)]).unwrap();
    // SAFETY: as in `on_gpu`.
    let out = unsafe { TensorViewMut::from_cuda(ADDRESS, DType::F32, 1, None, &[6], &[1]) };
    assert_eq!((out.device(), out.address(), out.stream()), (cuda, ADDRESS, None));
    out.check_on(cuda, "out", DType::F32, &[Some(6)]).unwrap();
}

#[test]
fn streams_have_the_numbers_of_the_array_interface() {
    assert_eq!((Stream::LEGACY_DEFAULT.number(), Stream::PER_THREAD_DEFAULT.number()), (1, 2));
    assert_eq!(Stream::new(0), None);
    let texts = [1, 2, 0x1000].map(|number| Stream::new(number).unwrap().to_string());
    assert_eq!(texts, ["1 (the legacy default)", "2 (the thread's default)", "0x1000"]);
}

#[test]
fn a_gpus_values_are_neither_read_nor_written_on_the_host() {
    let expected = "x: expected memory on cpu, got cuda:1";
    let view = on_gpu(ADDRESS, Some(Stream::LEGACY_DEFAULT), &[4], &[1]);
    assert_eq!(view.read::<f32>("x", &[None]).unwrap_err().to_string(), expected);
    let empty = on_gpu(0, None, &[0], &[1]);
    assert_eq!(empty.read::<f32>("x", &[None]).unwrap_err().to_string(), expected);
    // SAFETY: as in `on_gpu`.
    let mut out = unsafe { TensorViewMut::from_cuda(ADDRESS, DType::F32, 1, None, &[4], &[1]) };
    let filled = out.fill::<f32, (), TensorError>("x", &[None], |_| panic!("nothing may be filled"));
    assert_eq!(filled.unwrap_err().to_string(), expected);
}

#[test]
fn what_is_refused_on_the_host_is_refused_on_a_gpu() {
    let cuda = |id| Device { kind: DeviceKind::Cuda, id };
    let check = |view: TensorView, dims: &[Option<usize>]| view.check_on(cuda(1), "x", DType::F32, dims);
    let error = |address, shape: &[usize], strides: &[isize]| {
        check(on_gpu(address, None, shape, strides), &vec![None; shape.len()]).unwrap_err()
    };
    assert!(matches!(error(0, &[1], &[1]), TensorError::Null { .. }));
    assert!(matches!(error(ADDRESS + 2, &[1], &[1]), TensorError::Alignment { .. }));
    assert!(matches!(error(usize::MAX - 7, &[1024], &[1]), TensorError::Overflow { .. }));
    assert!(matches!(error(ADDRESS, &[usize::MAX, 2], &[2, 1]), TensorError::Overflow { .. }));
    assert!(matches!(error(ADDRESS, &[4], &[-1]), TensorError::Stride { .. }));
    assert!(matches!(error(ADDRESS, &[1; 7], &[1; 7]), TensorError::Rank { .. }));
    let other = on_gpu(ADDRESS, None, &[4], &[1]).check_on(cuda(0), "x", DType::F32, &[None]).unwrap_err();
    assert_eq!(other.to_string(), "x: expected memory on cuda:0, got cuda:1");
    let data = [0f32; 2];
    let host = TensorView::of(&data).check_on(cuda(0), "x", DType::F32, &[None]).unwrap_err();
    assert_eq!(host.to_string(), "x: expected memory on cuda:0, got cpu");
    // SAFETY: as in `on_gpu`.
    let out = unsafe { TensorViewMut::from_cuda(ADDRESS, DType::F32, 1, None, &[2, 3], &[1, 1]) };
    assert!(matches!(out.check_on(cuda(1), "x", DType::F32, &ANY), Err(TensorError::Overlap { .. })));
}

#[test]
fn refuses_a_stream_under_the_cpus_memory() {
    let data = [0f32; 2];
    let mut view = TensorView::of(&data);
    view.layout.stream = 2;
    let error = view.check("x", DType::F32, &[None]).unwrap_err();
    assert_eq!(error.to_string(), "x: expected no stream for memory on cpu, got 2 (the thread's default)");
}

#[test]
fn equal_addresses_of_two_devices_are_not_shared_memory() {
    let data = [0f32; 4];
    let host = TensorView::of(&data);
    let gpu = on_gpu(host.address(), None, &[4], &[1]);
    check_disjoint(&[("out", host.memory())], &[("x", gpu.memory())]).unwrap();
    let error = check_disjoint(&[("out", gpu.memory())], &[("x", gpu.memory())]).unwrap_err();
    assert_eq!(error.to_string(), "out and x share memory");
}

#[test]
fn refuses_a_negative_stride() {
    let data = [0f32; 4];
    let view = raw(data.as_ptr().cast(), &[4], &[-1]);
    assert!(matches!(view.check("x", DType::F32, &[None]), Err(TensorError::Stride { got: -1, .. })));
}

#[test]
fn refuses_a_shape_that_overflows() {
    let data = [0f32; 4];
    for (shape, strides) in [
        ([usize::MAX, 2], [2, 1]),
        ([2, 2], [isize::MAX, 1]),
        ([usize::MAX / 2, 4], [0, 0]), // no span, but a copy of it could not exist
        ([isize::MAX as usize / 4, 2], [2, 1]),
    ] {
        let view = raw(data.as_ptr().cast(), &shape, &strides);
        assert!(matches!(view.check("x", DType::F32, &ANY), Err(TensorError::Overflow { .. })), "{shape:?}");
    }
}

#[test]
fn refuses_a_copy_that_no_memory_holds() {
    let mut data = [1f32; 2];
    // One value, told to be read 2^60 times: it overflows nothing, and reaches no further than it may.
    let broadcast = raw(data.as_ptr().cast(), &[1 << 60], &[0]);
    broadcast.check("x", DType::F32, &[None]).unwrap();
    let error = broadcast.read::<f32>("x", &[None]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "x: no memory for a copy of 1152921504606846976 elements (shape [1152921504606846976])"
    );
    let mut out = raw_mut(data.as_mut_ptr().cast(), &[2, 1], &[1, 7]);
    assert_eq!(out.fill::<f32, _, TensorError>("x", &ANY, |v| Ok(v.len())), Ok(2));
}

#[test]
fn refuses_a_span_past_the_end_of_memory() {
    let view = raw((usize::MAX - 7) as *const c_void, &[1024], &[1]);
    assert!(matches!(view.check("x", DType::F32, &[None]), Err(TensorError::Overflow { .. })));
}

#[test]
fn refuses_null_unless_empty() {
    let view = raw(std::ptr::null(), &[1], &[1]);
    assert!(matches!(view.check("x", DType::F32, &[None]), Err(TensorError::Null { .. })));
    let empty = raw(std::ptr::null(), &[0], &[1]);
    assert!(empty.read::<f32>("x", &[None]).unwrap().is_empty());
}

#[test]
fn refuses_a_crooked_pointer() {
    let data = [0f32; 4];
    let view = raw(data.as_ptr().cast::<u8>().wrapping_add(1).cast(), &[2], &[1]);
    assert!(matches!(view.check("x", DType::F32, &[None]), Err(TensorError::Alignment { .. })));
}

#[test]
fn refuses_an_output_that_overlaps_itself() {
    let mut data = [0f32; 8];
    for (shape, strides) in [([2, 3], [0, 1]), ([2, 3], [1, 1]), ([2, 3], [2, 1])] {
        let view = raw_mut(data.as_mut_ptr().cast(), &shape, &strides);
        assert!(
            matches!(view.check("out", DType::F32, &ANY), Err(TensorError::Overlap { .. })),
            "{strides:?}"
        );
    }
    raw_mut(data.as_mut_ptr().cast(), &[2, 3], &[1, 2]).check("out", DType::F32, &ANY).unwrap();
}

#[test]
fn refuses_a_slice_of_another_length() {
    let error = TensorView::new(&[0f32; 5], &[2, 3]).unwrap_err();
    assert_eq!(error.to_string(), "tensor view: the shape [2, 3] needs 6 elements, the slice has 5");
    assert!(matches!(
        TensorViewMut::new(&mut [0f32; 5], &[usize::MAX, 3]),
        Err(TensorError::Length { got: 5, .. })
    ));
}

#[test]
fn refuses_arguments_that_share_memory() {
    let data = [0f32; 8];
    let (low, high) = data.split_at(4);
    let range = |s| TensorView::of::<f32>(s).memory();
    check_disjoint(&[("cos", range(low)), ("sin", range(high))], &[]).unwrap();
    let error = check_disjoint(&[("cos", range(&data[..5]))], &[("mu", range(high))]).unwrap_err();
    assert_eq!(error.to_string(), "cos and mu share memory");
    // An empty tensor shares nothing, wherever its pointer points.
    check_disjoint(&[("cos", range(&data))], &[("mu", range(&data[3..3]))]).unwrap();
}
