//! Attention of short rows that continue one document.
