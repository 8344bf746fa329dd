//! Text in, training batches and evaluation windows out.
//!
//! [`documents`] finds and reads text, [`packing`] joins the tokenised documents, orders chunks for training,
//! holds documents out and lays evaluation windows. Both are pure functions of their arguments (and of the
//! files): a batch is found again from its number alone, so a resumed run stores no data position beyond the
//! step it had reached.

pub mod documents;
pub mod packing;
