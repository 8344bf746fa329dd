//! The precision classes of a run, as `--dtype` and configurations name them.
//!
//! | class | storage | products | gradients, sums, norms, softmax, loss, masters of what learns |
//! |---|---|---|---|
//! | `f32` | f32 | f32 | f32 |
//! | `mixed` | f32 | bf16 | f32 |
//! | `bf16` | frozen weights and activations in bf16 | bf16 | f32 |
//!
//! bf16 products are taken where the machine has instructions for them ([`Products::Bf16`]); the sums are f32 in all.
//! Errors: a name that is none of the three.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::KernelError;
use crate::gemm::Products;

/// How values are stored and multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// f32 storage, bf16 products.
    Mixed,
    /// Frozen weights and activations stored in bf16, bf16 products.
    Bf16,
}

impl Precision {
    /// Every class, most exact first.
    pub const ALL: [Self; 3] = [Self::F32, Self::Mixed, Self::Bf16];

    /// Its name in configurations and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Mixed => "mixed",
            Self::Bf16 => "bf16",
        }
    }

    /// How matrix products are computed.
    pub fn products(self) -> Products {
        match self {
            Self::F32 => Products::F32,
            Self::Mixed | Self::Bf16 => Products::Bf16,
        }
    }

    /// Whether frozen weights and activations are stored in bf16.
    pub fn stores_bf16(self) -> bool {
        self == Self::Bf16
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Self, KernelError> {
        Self::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| {
            KernelError::argument("precision", format!("expected f32, mixed or bf16, got {name:?}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for p in Precision::ALL {
            assert_eq!(p.to_string().parse::<Precision>().unwrap(), p);
        }
        assert_eq!(Precision::default(), Precision::F32);
        assert!(Precision::Bf16.stores_bf16() && !Precision::Mixed.stores_bf16());
        assert_eq!(Precision::Mixed.products(), Products::Bf16);
    }

    #[test]
    fn another_name_is_refused() {
        let error = "fp16".parse::<Precision>().err().unwrap().to_string();
        assert!(error.contains("expected f32, mixed or bf16, got \"fp16\""), "{error}");
    }
}
