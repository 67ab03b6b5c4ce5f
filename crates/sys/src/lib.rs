//! evergate-sys
