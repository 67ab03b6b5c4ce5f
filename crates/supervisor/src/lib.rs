//! evergate-supervisor
