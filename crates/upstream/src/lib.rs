//! evergate-upstream
