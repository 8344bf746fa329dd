//! One step of GistNet's training: gists of drawn spans, what they cost the frozen base model, and the way back.
//!
//! Source: MegaContext's L = nll·ΔNLL@H + kl·KL + terms on gists alone ([`crate::losses`]). The gradient passes through the
//! frozen base model, and its adapter where it has one, into the gists, and through GistNet (both levels of it, where a span is
//! of the second level) into its weights.
//!
//! Passages are kept as far as a number of bytes allows ([`crate::passages`]).
//!
//! Shapes: S slots, K block, E model width. Units: nats. Errors: no document with room for a span; a loss or gradient that is
//! not finite, after which weights are as before.

use candle_core::{Device, Tensor};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::Decoder;
use megacontext_base::error::{BaseError, Result};
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::params::Group;
use megacontext_base::random::Random;
use megacontext_base::rope::{RopeScaling, SigmaRule};
use megacontext_kernels::attention::Pattern;

use crate::config::NETWORK;
use crate::curriculum::Stage;
use crate::delta_nll::{DeltaNll, Passage, Rows, Slot, Span, StandIn, Substitution};
use crate::losses::OnGists;
use crate::network::GistNet;
use crate::passages::Passages;

/// How contexts are computed.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Stretch of the base model's positions.
    pub scaling: RopeScaling,
    /// Where entries stand; `block` is K.
    pub rule: SigmaRule,
    /// Attention of documents and rows.
    pub pattern: Pattern,
}

impl Setting {
    /// ΔNLL@H of a model in this setting.
    ///
    /// # Errors
    /// As [`DeltaNll::new`].
    pub fn delta_nll<'a>(&self, decoder: &'a Decoder, horizon: usize) -> Result<DeltaNll<'a>> {
        DeltaNll::new(decoder, &self.scaling, self.rule, self.pattern, horizon)
    }
}

/// What a step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// What was made smaller, nats.
    pub loss: f64,
    /// Mean ΔNLL@H of the step's rows, nats.
    pub delta_nll: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Rows.
    pub rows: usize,
}

/// Trains a GistNet over a frozen base model.
pub struct GistTrainer<'a> {
    decoder: &'a Decoder,
    setting: Setting,
    /// The network.
    pub network: GistNet,
    /// Its optimiser.
    pub optimizer: Optimizer,
    gradients: Gradients,
    buffers: Buffers,
    passages: Passages,
    /// What stability holds gists to.
    anchor: Option<GistNet>,
}

/// A document of a step.
#[derive(Clone, Copy, Debug)]
pub struct Lesson<'a> {
    /// Its number among all documents.
    pub number: usize,
    /// Its tokens.
    pub tokens: &'a [u32],
    /// The spans that each row replaces, such as those that a policy collapsed; none means drawn by the stage.
    pub rows: Option<&'a [Vec<Span>]>,
}

/// The slots of one level, by number.
fn of_level(rows: &Rows, lod: u32) -> Vec<usize> {
    (0..rows.slots().len()).filter(|at| rows.slots()[*at].span.lod == lod).collect()
}

/// The embeddings that some slots of one level stand for, [S, K^lod, E].
fn children(rows: &Rows, slots: &[usize], passage: &Passage, block: usize, width: usize) -> Vec<f32> {
    let of = |at: &usize| {
        let Slot { span, .. } = rows.slots()[*at];
        passage.x_te[span.start * width..][..block.pow(span.lod) * width].iter().copied()
    };
    slots.iter().flat_map(of).collect()
}

/// Gists of all slots of a passage by a network, no way back, [S, E].
///
/// # Errors
/// As [`GistNet::gists`].
pub fn gists_of(network: &GistNet, rows: &Rows, passage: &Passage) -> Result<Vec<f32>> {
    let (block, width) = (network.config().block, network.config().width);
    let mut all = vec![0f32; rows.slots().len() * width];
    let levels = rows.slots().iter().map(|slot| slot.span.lod).max().unwrap_or(0);
    for lod in 1..=levels {
        let slots = of_level(rows, lod);
        let mut below = children(rows, &slots, passage, block, width);
        for level in (0..lod).rev() {
            below = network.gists(&below, slots.len() * block.pow(level))?;
        }
        for (at, gist) in slots.iter().zip(below.chunks_exact(width)) {
            all[at * width..][..width].copy_from_slice(gist);
        }
    }
    Ok(all)
}

impl<'a> GistTrainer<'a> {
    /// Of a network that has not learned or of one that goes on; `budget` bytes of passages are kept.
    ///
    /// # Errors
    /// When the base model learns, or network and model or block do not go together.
    pub fn new(
        decoder: &'a Decoder,
        setting: Setting,
        mut network: GistNet,
        adamw: AdamWConfig,
        budget: u64,
    ) -> Result<Self> {
        let (width, block) = (decoder.config().hidden_size, setting.rule.block);
        let c = network.config();
        if c.width != width || c.block != block {
            let message = format!(
                "expected a network of width {width} for blocks of {block}, got width {} and blocks of {}",
                c.width, c.block
            );
            return Err(BaseError::network(NETWORK, message));
        }
        network.params_mut().set_learning([Group::Gistnet])?;
        Ok(Self {
            decoder,
            setting,
            network,
            optimizer: Optimizer::new(adamw),
            gradients: Gradients::staying(),
            buffers: Buffers::default(),
            passages: Passages::new(budget),
            anchor: None,
        })
    }

    /// From now on stability holds gists to those of this network, which runs where the trained one does.
    ///
    /// # Errors
    /// When it is not of this one's shape.
    pub fn anchor(&mut self, mut anchor: GistNet) -> Result<()> {
        if anchor.config() != self.network.config() {
            let message = "stability: expected a checkpoint of this network, got one with other settings";
            return Err(BaseError::network(NETWORK, message));
        }
        anchor.set_device(&self.network.device())?;
        self.anchor = Some(anchor);
        Ok(())
    }

    /// Is there a network that stability holds gists to?
    pub fn is_anchored(&self) -> bool {
        self.anchor.is_some()
    }

    /// The memory of passes, for an evaluation between steps.
    pub fn buffers(&mut self) -> &mut Buffers {
        &mut self.buffers
    }

    /// The network, and the memory of passes, for its evaluation between steps.
    pub fn network_and_buffers(&mut self) -> (&GistNet, &mut Buffers) {
        (&self.network, &mut self.buffers)
    }

    /// Gradients of the last step, before clipping; those of blocks that ran on a GPU have stayed there.
    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// One step over some documents, up to `rows` rows of each where it does not bring its own.
    ///
    /// # Errors
    /// See the module.
    pub fn step(
        &mut self,
        lessons: &[Lesson],
        stage: &Stage,
        rows: usize,
        lr: f64,
        random: &mut Random,
    ) -> Result<StepReport> {
        let delta = self.setting.delta_nll(self.decoder, stage.horizon)?;
        let (block, width) = (self.setting.rule.block, self.decoder.config().hidden_size);
        let mut fresh: Vec<Option<Passage>> = Vec::with_capacity(lessons.len());
        for lesson in lessons {
            let (number, tokens) = (lesson.number, lesson.tokens);
            fresh.push(self.passages.run(number, tokens, &delta, stage.kl != 0.0, &mut self.buffers)?);
        }
        let passages: Vec<&Passage> = lessons
            .iter()
            .zip(&fresh)
            .map(|(lesson, fresh)| self.passages.of(lesson.number, fresh))
            .collect();
        let mut all: Vec<(&Passage, Rows)> = Vec::new();
        for (lesson, passage) in lessons.iter().zip(passages) {
            let drawn = match lesson.rows {
                Some(_) => Vec::new(),
                None => stage.draw(passage.document.tokens().len(), block, rows, random),
            };
            let spans = lesson.rows.unwrap_or(&drawn);
            if !spans.is_empty() {
                all.push((passage, delta.rows(passage, spans, StandIn::Entry)?));
            }
        }
        let count: usize = all.iter().map(|(_, rows)| rows.dims().0).sum();
        if count == 0 {
            let message = format!(
                "expected a document with an entry, a block of {block} and a horizon of {} tokens, got {} without",
                stage.horizon,
                lessons.len()
            );
            return Err(BaseError::network(NETWORK, message));
        }

        // Gists of all documents together, level by level.
        let levels =
            all.iter().flat_map(|(_, rows)| rows.slots()).map(|slot| slot.span.lod).max().unwrap_or(1);
        let mut taped: Vec<Taped> = Vec::new();
        for lod in 1..=levels {
            let mut values: Vec<f32> = Vec::new();
            let mut places = Vec::new();
            for (number, (passage, rows)) in all.iter().enumerate() {
                let slots = of_level(rows, lod);
                values.extend(children(rows, &slots, passage, block, width));
                places.extend(slots.into_iter().map(|at| (number, at)));
            }
            if places.is_empty() {
                continue;
            }
            let shape = (places.len(), block.pow(lod), width);
            let children_nse = Tensor::from_vec(values, shape, &Device::Cpu)?;
            let gists_ne = if lod == 1 {
                let seen = seen(places.len() * block, block, stage.dropout, random);
                self.network.forward(&children_nse, seen.as_deref())?
            } else {
                let made = self.network.hierarchy(&children_nse, lod)?;
                let Some(top) = made.last() else { continue };
                top.squeeze(1)?
            };
            taped.push(Taped { lod, places, children_nse, gists_ne });
        }
        let mut vectors: Vec<Vec<f32>> =
            all.iter().map(|(_, rows)| vec![0f32; rows.slots().len() * width]).collect();
        for made in &taped {
            let values: Vec<f32> = made.gists_ne.flatten_all()?.to_vec1()?;
            for ((number, at), gist) in made.places.iter().zip(values.chunks_exact(width)) {
                vectors[*number][at * width..][..width].copy_from_slice(gist);
            }
        }

        let (mut sum, mut loss) = (0f64, 0f64);
        let mut d_vectors = Vec::with_capacity(all.len());
        let weights = (stage.loss.boundary_weight != 1.0).then(|| stage.loss.position_weights(stage.horizon));
        for ((passage, rows), vectors) in all.iter_mut().zip(&vectors) {
            let share = rows.dims().0 as f64 / count as f64;
            let objective =
                Substitution { nll: stage.nll * share, kl: stage.kl * share, weights: weights.clone() };
            rows.fill(vectors)?;
            let measured = delta.measure(passage, rows, Some(&objective), &mut self.buffers)?;
            sum += measured.delta() * rows.dims().0 as f64;
            loss += measured.objective(&objective);
            d_vectors.push(measured.d_slots.unwrap_or_default());
        }

        self.gradients.clear();
        for made in &taped {
            let of =
                |(number, at): &(usize, usize)| d_vectors[*number][at * width..][..width].iter().copied();
            let d: Vec<f32> = made.places.iter().flat_map(of).collect();
            let d_ne = Tensor::from_vec(d, (made.places.len(), width), &Device::Cpu)?;
            let on_gists = if made.lod == 1 { self.on_gists(made, &all, stage)? } else { None };
            if let Some(term) = &on_gists {
                loss += f64::from(term.to_scalar::<f32>()?);
            }
            self.network.backward(&made.gists_ne, d_ne, on_gists.as_ref(), &mut self.gradients)?;
        }
        if !loss.is_finite() {
            return Err(BaseError::NonFinite { what: "loss".to_string(), value: loss });
        }
        let grad_norm = self.optimizer.step(self.network.params(), &self.gradients, lr)?;
        Ok(StepReport { loss, delta_nll: sum / count as f64, grad_norm, rows: count })
    }

    /// The stage's terms on gists alone.
    fn on_gists(&self, made: &Taped, all: &[(&Passage, Rows)], stage: &Stage) -> Result<Option<Tensor>> {
        let checkpoint_ne = match &self.anchor {
            Some(anchor) if stage.loss.stability != 0.0 => {
                Some(anchor.forward(&made.children_nse, None)?.detach())
            }
            _ => None,
        };
        let block = self.setting.rule.block;
        let start = |(number, at): &(usize, usize)| (*number, all[*number].1.slots()[*at].span.start);
        let mut order: Vec<usize> = (0..made.places.len()).collect();
        order.sort_by_key(|at| start(&made.places[*at]));
        let follows = |pair: &&[usize]| {
            let (a, b) = (start(&made.places[pair[0]]), start(&made.places[pair[1]]));
            a.0 == b.0 && a.1 + block == b.1
        };
        let neighbours: Vec<[usize; 2]> =
            order.windows(2).filter(follows).map(|pair| [pair[0], pair[1]]).collect();
        stage.loss.on_gists(&OnGists {
            gists_ne: &made.gists_ne,
            children_nke: &made.children_nse,
            neighbours: &neighbours,
            checkpoint_ne: checkpoint_ne.as_ref(),
        })
    }
}

/// Gists of one level with their graph, and which slots they fill.
struct Taped {
    lod: u32,
    /// Number of the passage, and of its slot.
    places: Vec<(usize, usize)>,
    children_nse: Tensor,
    gists_ne: Tensor,
}

/// Which of so many entries GistNet sees, at least one of every block; none where it sees all.
fn seen(entries: usize, block: usize, dropout: f64, random: &mut Random) -> Option<Vec<bool>> {
    if dropout == 0.0 {
        return None;
    }
    let mut seen: Vec<bool> = (0..entries).map(|_| random.unit() >= dropout).collect();
    for block in seen.chunks_exact_mut(block) {
        if !block.contains(&true) {
            block[random.below(block.len())] = true;
        }
    }
    Some(seen)
}
