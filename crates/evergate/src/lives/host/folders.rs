//! Folders that a host makes for its program: where it works, and where its socket is.

use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use evergate_core::config::process::{Ids, Mode, Process};
use evergate_core::inherit::{HOSTS_DIR_VARIABLE, host_folder};

/// Where only root makes folders, and everybody can get to one's own: the state folder is closed to other users.
const RUN: &str = "/run";

/// A program's folders.
pub(super) struct Folders {
    /// In which it works if its section names none.
    pub(super) work: PathBuf,
    /// In which a server has its socket: nobody else can put one there. It is gone with the host.
    pub(super) socket: Option<PathBuf>,
}

impl Folders {
    /// Makes those that it needs.
    ///
    /// # Errors
    /// Which it is, and what is wrong with it.
    pub(super) fn make(work: PathBuf, process: &Process, fingerprint: u64) -> Result<Self, String> {
        let told = |what: &str, folder: &Path, error: &io::Error| {
            format!("cannot make its {what} {}: {error}", folder.display())
        };
        if process.dir.is_none() {
            make(&work, process.user).map_err(|error| told("working folder", &work, &error))?;
        }
        let mut folders = Self { work, socket: None };
        if let Mode::Server(_) = process.mode {
            let hosts = std::env::var_os(HOSTS_DIR_VARIABLE).ok_or("no folder of hosts in the environment")?;
            let folder = socket_folder(process.user, &hosts, fingerprint);
            make(&folder, process.user).map_err(|error| told("socket's folder", &folder, &error))?;
            folders.socket = Some(folder);
        }
        Ok(folders)
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        let Some(folder) = &self.socket else { return };
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(entry.path());
        }
        // Whatever else the program has made there is its own to tidy up.
        let _ = std::fs::remove_dir(folder);
    }
}

fn socket_folder(user: Option<Ids>, hosts: &OsStr, fingerprint: u64) -> PathBuf {
    if user.is_none() {
        return Path::new(hosts).join(host_folder(fingerprint));
    }
    // Another gateway on this machine may have the same section.
    let all = hosts.as_bytes().iter().copied().chain(fingerprint.to_le_bytes());
    let hash =
        all.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    Path::new(RUN).join(format!("evergate-{}", host_folder(hash)))
}

/// Makes a folder that only the program's user, or the gateway's where it has none of its own, can look into.
fn make(folder: &Path, user: Option<Ids>) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let metadata = std::fs::symlink_metadata(folder)?;
    let own = rustix::process::geteuid().as_raw();
    let owner = user.map_or(own, |ids| ids.uid);
    if !metadata.is_dir() || ![own, owner].contains(&metadata.uid()) {
        return Err(io::Error::other("it is somebody else's"));
    }
    match user {
        Some(ids) => chown(folder, Some(ids.uid), Some(ids.gid)),
        None => Ok(()),
    }
}
