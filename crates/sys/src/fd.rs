//! Inherited descriptors and anonymous files.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::FdFlags;

/// Descriptors that were adopted already, so that one number has one owner. Contracts use numbers below 64.
static ADOPTED: AtomicU64 = AtomicU64::new(0);

/// Takes ownership of a descriptor that was inherited under a fixed number, and makes it close-on-exec.
///
/// # Errors
/// `EBADF` when it is not open, `InvalidInput` when the number is below 3 or above 63, or was adopted before.
pub fn adopt(number: i32) -> io::Result<OwnedFd> {
    let bit = match number {
        3..=63 => 1_u64 << number,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {number} is not inherited"))),
    };
    // SAFETY: the borrow lives for this check only; a number that is not open fails in fcntl(2).
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    if ADOPTED.fetch_or(bit, Ordering::AcqRel) & bit != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {number} was adopted before")));
    }
    // SAFETY: the descriptor is open (just checked), and `ADOPTED` hands each number out once, so nobody else made an
    // owner of it through this function. Callers use it for the numbers of the inheritance contract only, which the
    // standard library never hands out because they are open from the first instruction on.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// An empty anonymous file that can be sealed, close-on-exec.
///
/// # Errors
/// What memfd_create(2) says.
pub fn memfd(name: &CStr) -> io::Result<OwnedFd> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?)
}

/// Seals content and size for good.
///
/// # Errors
/// What fcntl(2) says; `EBUSY` while somebody has it mapped for writing.
pub fn seal(file: impl AsFd) -> io::Result<()> {
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    Ok(rustix::fs::fcntl_add_seals(file, seals)?)
}

/// Seals the size for good; the content stays writable.
///
/// # Errors
/// What fcntl(2) says.
pub fn seal_size(file: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fcntl_add_seals(file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW)?)
}

/// A new read-only open file description of the same file, with its own position at 0.
///
/// A duplicate would share the position, so that the second child to read an inherited file would find its end.
///
/// # Errors
/// What open(2) says; procfs must be mounted.
pub fn reopen_read_only(file: impl AsFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn sealed_file_cannot_be_changed_and_is_read_from_its_start_by_each() {
        let mut file = File::from(memfd(c"test").unwrap());
        file.write_all(b"hello").unwrap();
        seal(&file).unwrap();
        assert!(file.write_all(b"more").is_err());
        assert!(file.set_len(0).is_err());
        for _ in 0..2 {
            let mut text = String::new();
            File::from(reopen_read_only(&file).unwrap()).read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
        }
    }

    #[test]
    fn a_number_is_adopted_once() {
        let file = memfd(c"adopted").unwrap();
        let high = rustix::io::fcntl_dupfd_cloexec(&file, 40).unwrap();
        let number = high.as_raw_fd();
        assert!(number < 64);
        std::mem::forget(high);
        drop(adopt(number).unwrap());
        assert!(adopt(number).is_err());
        assert!(adopt(0).is_err());
        assert!(adopt(64).is_err());
    }
}
