//! How a worker learns, whatever becomes of this process, whether a program has seen anything of its request.
//!
//! Holds INV-HOST-2 (ARCHITECTURE.md).

use evergate_board::{Board, InflightPlace};

/// A request's mark on the board; none for who has sent no place.
#[derive(Clone, Debug, Default)]
pub struct Mark(Option<(Board, InflightPlace)>);

impl Mark {
    pub(crate) fn new(board: Option<&Board>, place: Option<&str>) -> Self {
        Self(board.cloned().zip(place.and_then(|place| place.parse().ok())))
    }

    /// To be called before a program sees the first byte of the request.
    pub(crate) fn set(&self) {
        if let Some((board, place)) = &self.0 {
            board.mark_taken(*place);
        }
    }
}
