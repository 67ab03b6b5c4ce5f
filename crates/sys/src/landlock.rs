//! Landlock: what a program and its descendants may reach in the file system (landlock(7), Linux 5.13).
//!
//! Best effort: a kernel that knows less confines less, and the level that was reached is told.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

/// `LANDLOCK_ACCESS_FS_EXECUTE`, `_READ_FILE` and `_READ_DIR`.
const READ: u64 = 1 | 1 << 2 | 1 << 3;
/// What a rule for a file that is no folder may name: execute, write, read, truncate.
const FILE: u64 = 1 | 1 << 1 | 1 << 2 | 1 << 14;

/// A set of rules, to be handed to any number of children as [`crate::Confine::landlock`].
#[derive(Debug)]
pub struct Landlock {
    rules: OwnedFd,
    abi: u32,
    handled: u64,
}

/// As the kernel's first version lays it out (linux/landlock.h).
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
}

/// Packed in the kernel's header too.
#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: i32,
}

impl Landlock {
    /// Rules that allow nothing yet. None where the kernel has no Landlock, or has it turned off.
    ///
    /// # Errors
    /// What landlock_create_ruleset(2) says.
    pub fn new() -> io::Result<Option<Self>> {
        const VERSION: libc::c_ulong = 1; // LANDLOCK_CREATE_RULESET_VERSION
        let (none, zero) = (std::ptr::null::<RulesetAttr>(), libc::c_ulong::from(0_u8));
        // SAFETY: with this flag the kernel reads no attributes and gives its version.
        let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, zero, VERSION) };
        let Ok(abi) = u32::try_from(abi) else { return Ok(None) };
        // Thirteen rights in the first version, then REFER, then TRUNCATE. Not IOCTL_DEV, which would take a program's
        // accelerator from it.
        let handled = match abi {
            0 => return Ok(None),
            1 => (1 << 13) - 1,
            2 => (1 << 14) - 1,
            _ => (1 << 15) - 1,
        };
        let attributes = RulesetAttr { handled_access_fs: handled };
        let size = size_of::<RulesetAttr>();
        // SAFETY: `attributes` is readable for `size` bytes.
        let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size, zero) };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor (close-on-exec); nobody else owns it.
        Ok(Some(Self { rules: unsafe { OwnedFd::from_raw_fd(fd) }, abi, handled }))
    }

    /// The kernel's version of Landlock: from 3 on all of this is enforced; before it, truncation (2) or truncation and
    /// renames between folders (1) are not.
    #[must_use]
    pub fn abi(&self) -> u32 {
        self.abi
    }

    /// Allows to read and execute what is there, and beneath it.
    ///
    /// # Errors
    /// What open(2) and landlock_add_rule(2) say.
    pub fn read(&self, path: &Path) -> io::Result<()> {
        self.allow(path, READ)
    }

    /// Allows to read, execute and change what is there, and beneath it.
    ///
    /// # Errors
    /// What open(2) and landlock_add_rule(2) say.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        self.allow(path, self.handled)
    }

    fn allow(&self, path: &Path, access: u64) -> io::Result<()> {
        const PATH_BENEATH: libc::c_ulong = 1; // LANDLOCK_RULE_PATH_BENEATH
        let place = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let is_folder = FileType::from_raw_mode(rustix::fs::fstat(&place)?.st_mode) == FileType::Directory;
        let allowed_access = self.handled & if is_folder { access } else { access & FILE };
        let rule = PathBeneathAttr { allowed_access, parent_fd: place.as_raw_fd() };
        let (rules, zero) = (self.rules.as_raw_fd(), libc::c_ulong::from(0_u8));
        // SAFETY: `rule` is of the kind that the number announces and readable; the descriptors are open.
        let outcome = unsafe { libc::syscall(libc::SYS_landlock_add_rule, rules, PATH_BENEATH, &raw const rule, zero) };
        if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Landlock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.rules.as_fd()
    }
}
