//! Requests whose large bodies are being read. They are not admitted yet, and hold memory all the same: when it runs out, they
//! may be ended like those under way (J3).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Gate;
use crate::context::Token;

/// The tokens of such requests, by their sequence number.
#[derive(Debug, Default)]
pub(super) struct Incoming(Mutex<HashMap<u32, Arc<Token>>>);

impl Incoming {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Token>>> {
        // Inserting and removing leave the map whole whatever happens between.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that holds the most, of those that go on.
    pub(super) fn most(&self) -> Option<Arc<Token>> {
        let all = self.lock();
        all.values().filter(|token| token.cause().is_none()).max_by_key(|token| token.held()).map(Arc::clone)
    }
}

/// A request is among them for as long as this lives.
#[derive(Debug)]
pub struct Shown {
    gate: Arc<Gate>,
    seq: u32,
}

impl Gate {
    /// Shows a request whose large body is about to be read.
    #[must_use]
    pub fn show_incoming(self: &Arc<Self>, seq: u32, token: &Arc<Token>) -> Shown {
        self.incoming.lock().insert(seq, Arc::clone(token));
        Shown { gate: Arc::clone(self), seq }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.gate.incoming.lock().remove(&self.seq);
    }
}
