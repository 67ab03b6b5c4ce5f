//! evergate-board
