//! The tower as what the decoder's blocks understand, and what it takes of a GPU.
//!
//! Shapes: E width. Units: bytes.

use megacontext_kernels::precision::Precision;

use super::{EPS, THETA, TowerConfig};
use crate::architecture::{self, Architecture, Mlp, NormKind, QkNorm, Residual, Rotation};
use crate::buffers::PassShape;
use crate::buffers::gpu::{self, GpuBytes};
use crate::config::{DecoderConfig, Family};
use crate::device::Device;
use crate::names::Names;
use crate::params::Group;
use crate::rope::{PositionOptions, RopeScaling};

impl TowerConfig {
    /// The tower as a decoder's blocks; there is no embedding and no head.
    pub(super) fn described(&self) -> DecoderConfig {
        let head = self.head_width();
        let layer = architecture::Layer { window: None, rotation: Rotation::Global };
        DecoderConfig {
            family: Family::NanochatGpt,
            architecture: Architecture {
                names: &Names::TOWER,
                norm: NormKind::RmsPlain,
                mlp: Mlp::Relu2,
                qk_norm: QkNorm::AfterRotary,
                residual: Residual::Sequential,
                fused_qkv: false,
                qkv_bias: false,
                out_bias: false,
                mlp_bias: false,
                rotary_width: head,
                rotary_direction: -1.0,
                local_theta: None,
                layers: vec![layer; self.layers],
                query_scale: 1.0 / (head as f64).sqrt(),
                embedding_scale: None,
                embedding_norm: false,
                softcap: None,
            },
            vocab_size: 1,
            hidden_size: self.width,
            intermediate_size: 4 * self.width,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: head,
            rms_norm_eps: EPS,
            rope_theta: THETA,
            max_position_embeddings: 1,
            tie_word_embeddings: true,
            rope_scaling: RopeScaling::None,
            positions: PositionOptions::default(),
            bos_token_id: None,
            eos_token_id: None,
            raw: serde_json::Map::new(),
        }
    }

    /// Is it a GPU that can run the tower?
    pub fn goes_to(&self, device: &Device) -> bool {
        !device.is_cpu() && device.check(&self.described()).is_ok()
    }

    /// What a tower of these sizes takes of a GPU beside a model, over `entries` entries of all calls that are walked back together:
    /// its weights, the inputs of its blocks and its optimiser stay, the rest is there while a call runs. `learns` walks back.
    /// Nothing on the processor, and where the device cannot run it.
    pub fn gpu_bytes(&self, device: &Device, entries: usize, learns: bool) -> GpuBytes {
        if !self.goes_to(device) {
            return GpuBytes::default();
        }
        let config = self.described();
        let pass = PassShape { entries, precision: Precision::F32, lora: None };
        let all = match learns {
            true => gpu::training_bytes(&config, pass, self.layers, true, &[Group::Base]),
            false => gpu::evaluation_bytes(&config, pass),
        };
        let optimizer = match learns {
            true => gpu::optimizer_bytes(&config, Precision::F32, &[Group::Base], None, true),
            false => 0,
        };
        let inputs = if learns { 4 * (entries * self.width * self.layers) as u64 } else { 0 };
        GpuBytes {
            // What products work in is the model's.
            weights: all.weights - gpu::BLAS,
            optimizer,
            activations: inputs,
            passing: all.total() - all.weights - inputs,
            ..GpuBytes::default()
        }
    }
}
