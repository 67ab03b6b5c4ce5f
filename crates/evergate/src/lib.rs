//! Evergate.
