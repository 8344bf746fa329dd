//! The stack of blocks of GistNet and LensNet on the device: forward, and back through candle's tape.

use anyhow::{Context, Result, ensure};
use candle_core::{Device as Host, Tensor, Var};
use megacontext_base::device::Device;
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::random::Random;
use megacontext_base::rope::{Rope, RopeScaling, RopeTables};
use megacontext_base::tower::{Angles, Sees, THETA, Tower, TowerConfig};
use megacontext_kernels::attention::{Pattern, Rows};

use crate::support::{close, close_gradients, device, distance};

const SIZES: TowerConfig = TowerConfig { layers: 3, width: 32, heads: 4, kv_heads: 2 };
const BATCH: usize = 3;
const ENTRIES: usize = 7;

fn fresh(config: TowerConfig) -> Result<(Tower, ParamStore)> {
    let tower = Tower::new("tower", config)?;
    let mut params = ParamStore::new();
    tower.insert_parameters(&mut params, Group::Gistnet, 3)?;
    params.set_learning([Group::Gistnet])?;
    Ok((tower, params))
}

fn random(seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..BATCH * ENTRIES * SIZES.width).map(|_| random.normal() as f32).collect()
}

fn tensor(values: Vec<f32>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, (BATCH, ENTRIES, SIZES.width), &Host::Cpu)?)
}

fn angles(tables: &RopeTables) -> Angles<'_> {
    Angles { cos: &tables.cos_nd, sin: &tables.sin_nd }
}

/// What a graph gives: the result, the input's gradient, the parameters'.
struct Found {
    out: Vec<f32>,
    dx: Vec<f32>,
    gradients: Gradients,
}

/// Two passes on one tape, of which the second reads the first, as levels of gists do.
fn run(
    tower: &Tower,
    params: &ParamStore,
    tables: &RopeTables,
    pattern: Pattern,
    rows: &Rows,
) -> Result<Found> {
    let x = Var::from_tensor(&tensor(random(1))?)?.into_inner();
    let (sees, probe) = (Sees::Pattern(pattern, rows), tensor(random(2))?);
    let middle = tower.forward(params, &x, angles(tables), sees)?;
    let out = tower.forward(params, &(&middle * 0.5)?, angles(tables), sees)?;
    let loss = ((&out * &probe)?.sum_all()? + middle.sqr()?.sum_all()?)?;
    let mut gradients = Gradients::new();
    let [out, dx] = [&out, loss.backward()?.get(&x).context("the input's")?]
        .map(|tensor| tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>()));
    // A graph is walked once: this is another.
    let again =
        tower.forward(params, &tower.forward(params, &x, angles(tables), sees)?, angles(tables), sees)?;
    gradients.add_backward(&(again * probe)?.sum_all()?, params)?;
    Ok(Found { out: out?, dx: dx?, gradients })
}

#[test]
fn towers_are_the_processors_there_and_back() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let places: Vec<f64> = (0..BATCH * ENTRIES).map(|at| (at * at % 17) as f64).collect();
    let rope = Rope::new(SIZES.head_width(), THETA, RopeScaling::None);
    let (of_a_row, of_all) = (rope.sequence(ENTRIES)?, rope.at(&places, None)?);
    let short = Rows { lengths: Some(vec![5, ENTRIES, 1]), segments: None };
    let cases = [
        ("causal", &of_a_row, Pattern::Dense, Rows::default()),
        ("both ways", &of_a_row, Pattern::Bidirectional, Rows::default()),
        ("short rows at angles of their own", &of_all, Pattern::Bidirectional, short),
        ("shifted groups", &of_a_row, Pattern::ShiftedBidirectional { group: 4 }, Rows::default()),
    ];
    for (what, tables, pattern, rows) in cases {
        let (mut tower, params) = fresh(SIZES)?;
        let expected = run(&tower, &params, tables, pattern, &rows)?;
        let mut plain = random(1);
        tower.forward_in_place(&params, &mut plain, BATCH, angles(tables), pattern, &rows)?;
        tower.set_device(&lease.device)?;
        ensure!(!tower.device().is_cpu());
        let got = run(&tower, &params, tables, pattern, &rows)?;
        close(&format!("{what}: the result"), &got.out, &expected.out, 1e-4)?;
        close(&format!("{what}: the input's gradient"), &got.dx, &expected.dx, 2e-4)?;
        close_gradients(what, &got.gradients, &expected.gradients, 2e-4)?;
        let mut here = random(1);
        tower.forward_in_place(&params, &mut here, BATCH, angles(tables), pattern, &rows)?;
        close(&format!("{what}: in place"), &here, &plain, 1e-4)?;
        // Back again, to the bit.
        tower.set_device(&Device::Cpu)?;
        ensure!(run(&tower, &params, tables, pattern, &rows)?.out == expected.out, "{what}");
    }
    Ok(())
}

#[test]
fn towers_learn_there_what_they_learn_on_the_processor() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let rope = Rope::new(SIZES.head_width(), THETA, RopeScaling::None).sequence(ENTRIES)?;
    let rows = Rows::default();
    let learned = |device: &Device| -> Result<Vec<f32>> {
        let (mut tower, params) = fresh(SIZES)?;
        tower.set_device(device)?;
        let mut optimizer = Optimizer::new(AdamWConfig { eps: 1e-3, ..AdamWConfig::default() });
        let mut gradients = Gradients::staying();
        for step in 0..4 {
            gradients.clear();
            for graph in 0..2 {
                let sees = Sees::Pattern(Pattern::Bidirectional, &rows);
                let out = tower.forward(&params, &tensor(random(step + 10 * graph))?, angles(&rope), sees)?;
                gradients.add_backward(&(out.sqr()?.mean_all()?), &params)?;
            }
            optimizer.step(&params, &gradients, 1e-2)?;
        }
        values(&params)
    };
    let (before, expected, got) =
        (values(&fresh(SIZES)?.1)?, learned(&Device::Cpu)?, learned(&lease.device)?);
    close("what was learned", &got, &expected, 1e-3)?;
    ensure!(distance(&expected, &before) > 1e-2, "nothing was learned");
    Ok(())
}

#[test]
fn a_tower_that_has_learned_may_be_placed_once_more() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let rope = Rope::new(SIZES.head_width(), THETA, RopeScaling::None).sequence(ENTRIES)?;
    let rows = Rows::default();
    let (mut tower, params) = fresh(SIZES)?;
    tower.set_device(&lease.device)?;
    let forward = |tower: &Tower| -> Result<Vec<f32>> {
        let sees = Sees::Pattern(Pattern::Dense, &rows);
        Ok(tower.forward(&params, &tensor(random(1))?, angles(&rope), sees)?.flatten_all()?.to_vec1()?)
    };
    let mut optimizer = Optimizer::new(AdamWConfig::default());
    let learn = |tower: &Tower, optimizer: &mut Optimizer| -> Result<()> {
        let mut gradients = Gradients::staying();
        let sees = Sees::Pattern(Pattern::Dense, &rows);
        let out = tower.forward(&params, &tensor(random(1))?, angles(&rope), sees)?;
        gradients.add_backward(&out.sqr()?.sum_all()?, &params)?;
        optimizer.step(&params, &gradients, 1e-2)?;
        Ok(())
    };
    let untrained = forward(&tower)?;
    learn(&tower, &mut optimizer)?;
    let trained = forward(&tower)?;
    ensure!(distance(&trained, &untrained) > 1e-3);
    // The newest values are where it was before.
    tower.set_device(&lease.device)?;
    close("placed once more", &forward(&tower)?, &trained, 1e-6)?;
    learn(&tower, &mut optimizer)?;
    let further = forward(&tower)?;
    ensure!(distance(&further, &trained) > 1e-3);
    tower.set_device(&Device::Cpu)?;
    close("on the processor", &forward(&tower)?, &further, 1e-4)
}

/// All values that learn.
fn values(params: &ParamStore) -> Result<Vec<f32>> {
    let leaves = params.trainable()?.into_iter();
    let values = leaves.map(|(_, leaf)| Ok(leaf.flatten_all()?.to_vec1::<f32>()?));
    Ok(values.collect::<Result<Vec<_>>>()?.concat())
}

#[test]
fn a_graph_is_walked_once_and_nothing_of_a_walk_that_failed_is_counted() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let (mut tower, params) = fresh(SIZES)?;
    tower.set_device(&lease.device)?;
    let rope = Rope::new(SIZES.head_width(), THETA, RopeScaling::None).sequence(ENTRIES)?;
    let rows = Rows::default();
    let sees = Sees::Pattern(Pattern::Dense, &rows);
    let first = tower.forward(&params, &tensor(random(1))?, angles(&rope), sees)?;
    let second = tower.forward(&params, &tensor(random(2))?, angles(&rope), sees)?;
    let mut expected = Gradients::new();
    expected.add_backward(&first.sum_all()?, &params)?;
    let mut gradients = Gradients::new();
    // Both are walked here, but the first one has been: what the second left with the parameters is not of the next walk.
    let both = (first.sum_all()? + second.sum_all()?)?;
    let refused = gradients.add_backward(&both, &params).unwrap_err().to_string();
    ensure!(refused.contains("expected one forward and one backward pass for each graph"), "{refused}");
    ensure!(gradients.names().next().is_none(), "gradients of a walk that failed");
    let again = tower.forward(&params, &tensor(random(1))?, angles(&rope), sees)?;
    gradients.add_backward(&again.sum_all()?, &params)?;
    close_gradients("after a walk that failed", &gradients, &expected, 1e-6)
}

#[test]
fn a_frozen_tower_gives_no_gradient_and_keeps_nothing() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let (mut tower, mut params) = fresh(SIZES)?;
    tower.set_device(&lease.device)?;
    let rope = Rope::new(SIZES.head_width(), THETA, RopeScaling::None).sequence(ENTRIES)?;
    let rows = Rows::default();
    let sees = Sees::Pattern(Pattern::Dense, &rows);
    params.set_learning([])?;
    let frozen = tower.forward(&params, &tensor(random(1))?, angles(&rope), sees)?;
    ensure!(!frozen.track_op(), "a frozen network is on the tape");
    let before = lease.memory().map(|memory| memory.now()).transpose()?;
    // Through frozen parameters to an input that learns.
    let x = Var::from_tensor(&tensor(random(1))?)?.into_inner();
    let out = tower.forward(&params, &x, angles(&rope), sees)?;
    let dx = out.sum_all()?.backward()?.get(&x).context("the input's")?.clone();
    ensure!(dx.abs()?.sum_all()?.to_scalar::<f32>()? > 0.0);
    drop((out, dx));
    if let Some(before) = before {
        let after = lease.memory().context("the emulated device")?.now()?;
        ensure!(after == before, "{before} bytes before a walk, {after} behind it");
    }
    Ok(())
}

#[test]
fn heads_that_the_device_does_not_run_are_refused_and_stay() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let mut tower = Tower::new("tower", TowerConfig { heads: 8, kv_heads: 8, ..SIZES })?;
    let refused = tower.set_device(&lease.device).unwrap_err().to_string();
    ensure!(refused.contains("a multiple of 8 up to 256, got 4"), "{refused}");
    ensure!(tower.device().is_cpu());
    Ok(())
}

#[test]
fn a_walk_takes_what_was_said() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let Some(memory) = lease.memory() else { return Ok(()) };
    for (sizes, learns) in [(SIZES, true), (SIZES, false), (TowerConfig { layers: 1, ..SIZES }, true)] {
        let (mut tower, mut params) = fresh(sizes)?;
        if !learns {
            params.set_learning([])?;
        }
        let rope = Rope::new(sizes.head_width(), THETA, RopeScaling::None).sequence(ENTRIES)?;
        let rows = Rows::default();
        let before = memory.now()?;
        tower.set_device(&lease.device)?;
        lease.device.forget_peak()?;
        let sees = Sees::Pattern(Pattern::Bidirectional, &rows);
        let mut optimizer = Optimizer::new(AdamWConfig::default());
        let mut gradients = Gradients::staying();
        for _ in 0..2 {
            gradients.clear();
            // Two graphs, as two levels of gists make them.
            for _ in 0..if learns { 2 } else { 1 } {
                let out = tower.forward(&params, &tensor(random(1))?, angles(&rope), sees)?;
                if learns {
                    gradients.add_backward(&out.sum_all()?, &params)?;
                }
            }
            optimizer.step(&params, &gradients, 1e-3)?;
        }
        let said = sizes.gpu_bytes(&lease.device, BATCH * ENTRIES, learns);
        lease.took(&format!("{sizes:?}, {learns}"), before, said)?;
    }
    Ok(())
}
