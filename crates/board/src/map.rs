//! The mapping itself: the only place of this crate that needs `unsafe`.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::mem::{align_of, size_of};
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

use crate::atomic::AtomicU64;

/// A type that may lie in shared memory.
///
/// # Safety
/// It is made of atomics only (so that a concurrent write is no data race), in a fixed layout (`repr(C)` or
/// transparent), every bit pattern is valid, and it has no drop glue and no pointers.
pub(crate) unsafe trait Shared: Sync {}

// SAFETY: one atomic word, in tests in a transparent wrapper.
unsafe impl Shared for AtomicU64 {}
// SAFETY: `repr(C)` structs of `AtomicU64` and arrays of it.
unsafe impl Shared for crate::layout::Head {}
// SAFETY: as above.
unsafe impl Shared for crate::rows::MasterRow {}
// SAFETY: as above.
unsafe impl Shared for crate::rows::ChildRow {}
// SAFETY: as above.
unsafe impl Shared for crate::hosts::HostRow {}
// SAFETY: as above.
unsafe impl Shared for crate::inflight::InflightRow {}
// SAFETY: as above.
unsafe impl Shared for crate::labels::LabelRow {}
// SAFETY: as above.
unsafe impl Shared for crate::series::Cell {}
// SAFETY: as above.
unsafe impl Shared for crate::series::SeriesHead {}
// SAFETY: as above.
unsafe impl Shared for crate::permits::TableHead {}
// SAFETY: as above.
unsafe impl Shared for crate::permits::Line {}
// SAFETY: as above.
unsafe impl Shared for crate::records::RingHead {}

/// A shared mapping of a whole file whose size is sealed.
#[derive(Debug)]
pub(crate) struct Map {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is plain memory that belongs to no thread, and is only lent out as `Shared` types.
unsafe impl Send for Map {}
// SAFETY: as above; `Shared` types are `Sync`.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `length` bytes from the file's start. The caller has checked that the file is that long and cannot shrink,
    /// or an access behind its end would be a SIGBUS.
    pub(crate) fn new(file: impl AsFd, length: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        let start: NonNull<u8> =
            NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        // A core dump would read, and so allocate, every page that was never touched. That it may do so is no failure.
        // SAFETY: the mapping that was just made; what is said of it changes nothing that is in it.
        let _ = unsafe { rustix::mm::madvise(start.as_ptr().cast(), length, rustix::mm::Advice::LinuxDontDump) };
        Ok(Self { start, length })
    }

    /// `count` values from `offset` on; an empty slice when they do not lie within the mapping, aligned.
    pub(crate) fn slice<T: Shared>(&self, offset: usize, count: usize) -> &[T] {
        let end = size_of::<T>().checked_mul(count).and_then(|bytes| bytes.checked_add(offset));
        // The mapping starts on a page, and no `Shared` type is aligned to more than one.
        if end.is_none_or(|end| end > self.length) || !offset.is_multiple_of(align_of::<T>()) {
            return &[];
        }
        // SAFETY: in bounds and aligned, both just checked; `T` is made of atomics for which every bit pattern is
        // valid, so that other processes may write at any time; the mapping lives as long as the borrow of `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset).cast::<T>(), count) }
    }

    /// One value at `offset`.
    pub(crate) fn at<T: Shared>(&self, offset: usize) -> Option<&T> {
        self.slice(offset, 1).first()
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody can borrow from it any more. Failure would leak it, no worse.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast::<c_void>(), self.length) };
    }
}
