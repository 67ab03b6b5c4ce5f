//! The one kind of word that the board is made of.
//!
//! In the tests of this crate a word is the same word with a point before each access at which the checker may let another
//! thread go on, or end this one as a KILL does (`models`). Nothing else knows that.

#[cfg(not(test))]
pub(crate) use std::sync::atomic::AtomicU64;

#[cfg(test)]
pub(crate) use crate::models::word::AtomicU64;

/// Whether a planted mistake is switched on (`models::MISTAKES`); never in the real program.
macro_rules! planted {
    ($name:ident) => {{
        #[cfg(test)]
        {
            crate::models::is_on(crate::models::Mistake::$name)
        }
        #[cfg(not(test))]
        {
            false
        }
    }};
}
pub(crate) use planted;
