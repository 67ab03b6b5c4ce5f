//! Files of the state folder. What stands there under their names may be anything, and the open of a pipe could wait for
//! ever.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// Longest file that is read whole: a run file has some hundred bytes for each process.
const BYTES_MAX: u64 = 1 << 20;

/// Opens a file as `options` say, but no pipe and no socket.
///
/// # Errors
/// What open(2) says; [`io::ErrorKind::InvalidInput`] for what can be no file of ours.
pub(crate) fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let is_strange = |kind: std::fs::FileType| kind.is_fifo() || kind.is_socket();
    let refused = || io::Error::new(io::ErrorKind::InvalidInput, "it is a pipe or a socket, not a file; remove it");
    let file = match options.custom_flags(flags).open(path) {
        // A socket, or a pipe that nobody reads (ENXIO).
        Err(_) if std::fs::metadata(path).is_ok_and(|metadata| is_strange(metadata.file_type())) => {
            return Err(refused());
        }
        outcome => outcome?,
    };
    if is_strange(file.metadata()?.file_type()) { Err(refused()) } else { Ok(file) }
}

/// The whole of a file.
///
/// # Errors
/// As [`open`], and what read(2) says.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(File::options().read(true), path)?.take(BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    #[test]
    fn a_pipe_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let kind = |outcome: io::Result<File>| outcome.unwrap_err().kind();
        let write = || open(File::options().append(true).create(true), &path);
        assert_eq!(kind(write()), io::ErrorKind::InvalidInput);
        assert_eq!(kind(open(File::options().read(true), &path)), io::ErrorKind::InvalidInput);
        // With a reader as well.
        let _reader = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(kind(write()), io::ErrorKind::InvalidInput);
        assert_eq!(read(&folder.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(open(File::options().append(true), Path::new("/dev/null")).is_ok());
    }
}
