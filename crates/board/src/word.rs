//! What fits into one word of the board, and back from a word that anybody may have written.

/// A value that is stored as one 64-bit word.
pub(crate) trait Word: Sized {
    /// The word.
    fn to_word(self) -> u64;
    /// The value; for a word that means none, the harmless end of the range.
    fn from_word(word: u64) -> Self;
}

impl Word for u64 {
    fn to_word(self) -> u64 {
        self
    }
    fn from_word(word: u64) -> Self {
        word
    }
}

impl Word for u32 {
    fn to_word(self) -> u64 {
        self.into()
    }
    fn from_word(word: u64) -> Self {
        Self::try_from(word).unwrap_or(Self::MAX)
    }
}

impl Word for i32 {
    fn to_word(self) -> u64 {
        u64::try_from(self).unwrap_or(0)
    }
    fn from_word(word: u64) -> Self {
        Self::try_from(word).unwrap_or(0)
    }
}

impl Word for bool {
    fn to_word(self) -> u64 {
        self.into()
    }
    fn from_word(word: u64) -> Self {
        word == 1
    }
}

/// Defines a row of words with a getter and a setter each. Loads acquire and stores release: what a process wrote before
/// it changed a word is seen by whoever sees the change.
macro_rules! row {
    ($(#[$row_doc:meta])* $row:ident { $($(#[$doc:meta])* $get:ident $set:ident $kind:ty;)+ } with { $($extra:ident: $extra_kind:ty,)* }) => {
        $(#[$row_doc])*
        #[derive(Debug)]
        #[repr(C, align(128))]
        pub struct $row {
            $($get: crate::atomic::AtomicU64,)+
            $($extra: $extra_kind,)*
        }

        impl $row {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $get(&self) -> $kind {
                    <$kind as crate::word::Word>::from_word(self.$get.load(std::sync::atomic::Ordering::Acquire))
                }

                #[doc = concat!("Sets [`Self::", stringify!($get), "`].")]
                pub fn $set(&self, value: $kind) {
                    self.$get.store(crate::word::Word::to_word(value), std::sync::atomic::Ordering::Release);
                }
            )+
        }
    };
}
pub(crate) use row;
