//! Products with a side of LoRA's rank, against sums in f64.

use megacontext_kernels::gemm::Mat;
use megacontext_kernels::linear::Dropout;
use megacontext_kernels::skinny;
use megacontext_kernels::store::Store;

use crate::support::*;

const DROPOUT: Option<Dropout> = Some(Dropout { p: 0.3, seed: 11 });

/// x as it takes part: dropped where there is dropout.
fn taking_part<S: Store>(x: &[S], dropout: Option<Dropout>) -> Vec<f64> {
    let mut x = narrow(x);
    if let Some(dropout) = dropout {
        dropout.apply(&mut x);
    }
    wide(&x)
}

fn all_three<S: Store>(n: usize, width: usize, rank: usize, dropout: Option<Dropout>) {
    let what = format!("n {n}, width {width}, rank {rank}, {:?}, {dropout:?}", S::DTYPE);
    let x: Vec<S> = numbers(n * width, 1).iter().map(|v| S::put(*v)).collect();
    let (m, low) = (numbers(rank * width, 2), numbers(n * rank, 3));
    let (x64, m64, low64) = (taking_part(&x, dropout), wide(&m), wide(&low));
    let mut turned = vec![0f32; m.len()];
    for r in 0..rank {
        for i in 0..width {
            turned[i * rank + r] = m[r * width + i];
        }
    }
    let (as_is, from_turned) = (Mat::new(&m, rank, width), Mat::new(&turned, width, rank).t());

    let want: Vec<f64> = (0..n * rank)
        .map(|at| (0..width).map(|i| 0.5 * x64[at / rank * width + i] * m64[at % rank * width + i]).sum())
        .collect();
    let (mut got, mut again) = (vec![9f32; n * rank], vec![9f32; n * rank]);
    skinny::down(&x, as_is, 0.5, dropout, &mut got);
    skinny::down(&x, from_turned, 0.5, dropout, &mut again);
    close(&got, &want, 2e-6, &format!("down, {what}"));
    close(&again, &want, 2e-6, &format!("down of a transpose, {what}"));

    let mut through: Vec<f32> = (0..n * width)
        .map(|at| {
            (0..rank).map(|r| low64[at / width * rank + r] * m64[r * width + at % width]).sum::<f64>() as f32
        })
        .collect();
    if let Some(dropout) = dropout {
        dropout.apply(&mut through);
    }
    let want: Vec<f64> = wide(&x).iter().zip(&through).map(|(y, t)| y + f64::from(*t)).collect();
    let tolerance = if S::EXACT { 2e-6 } else { BF16 };
    let (mut got, mut again) = (x.clone(), x.clone());
    skinny::up_add(&low, as_is, dropout, &mut got);
    skinny::up_add(&low, from_turned, dropout, &mut again);
    close(&narrow(&got), &want, tolerance, &format!("up, {what}"));
    assert_eq!(got, again, "up of a transpose, {what}");

    let base = numbers(rank * width, 4);
    let want: Vec<f64> = (0..rank * width)
        .map(|at| {
            let sum: f64 = (0..n).map(|i| low64[i * rank + at / width] * x64[i * width + at % width]).sum();
            f64::from(base[at]) + sum
        })
        .collect();
    let mut got = base.clone();
    skinny::outer_add(&low, rank, &x, width, dropout, &mut got, false);
    close(&got, &want, 2e-6, &format!("outer, {what}"));
    let mut got = vec![0f32; rank * width];
    for (at, value) in base.iter().enumerate() {
        got[at % width * rank + at / width] = *value;
    }
    skinny::outer_add(&low, rank, &x, width, dropout, &mut got, true);
    let back: Vec<f32> = (0..rank * width).map(|at| got[at % width * rank + at / width]).collect();
    close(&back, &want, 2e-6, &format!("outer, transposed, {what}"));
}

#[test]
fn skinny_products_match_f64_at_odd_sizes() {
    for (n, width) in [(1, 1), (3, 17), (49, 31), (130, 96), (97, 577), (70, 1100)] {
        for rank in [1, 4, 7, 8, 9, 16, 33, 64] {
            for dropout in [None, DROPOUT] {
                all_three::<f32>(n, width, rank, dropout);
                all_three::<megacontext_kernels::store::bf16>(n, width, rank, dropout);
            }
        }
    }
}

#[test]
fn skinny_products_give_the_same_bytes_on_any_number_of_threads() {
    let (n, width, rank) = (1500, 200, 8);
    let (x, m) = (numbers(n * width, 1), numbers(rank * width, 2));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mat = Mat::new(&m, rank, width);
            let (mut low, mut y, mut out) = (vec![0f32; n * rank], x.clone(), m.clone());
            skinny::down(&x, mat, 0.5, None, &mut low);
            skinny::up_add(&low, mat, None, &mut y);
            skinny::outer_add(&low, rank, &x, width, DROPOUT, &mut out, false);
            (low, y, out)
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

#[test]
fn skinny_products_of_nothing_leave_what_is_there() {
    let mat = Mat::new(&[], 0, 5);
    let (mut y, mut out) = (vec![1f32; 10], vec![1f32; 5]);
    skinny::up_add(&[], mat, None, &mut y);
    skinny::outer_add::<f32>(&[], 1, &[], 5, None, &mut out, false);
    assert_eq!((y, out), (vec![1.0; 10], vec![1.0; 5]));
}
