//! Validates a configuration for the master, in a process of its own: the master parses no TOML.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use evergate_core::config::{self, Facts, Loaded, Mistake, Roots, Sealed, Source};
use evergate_core::inherit::{self, code};
use evergate_upstream::Trust;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::descriptors;
use crate::cli::ConfigArgs;
use crate::server::tls;

/// Taken when no other is named, if it exists.
const FILE_DEFAULT: &str = "evergate.toml";
/// Most programs: the board has rows for so many and for those of a generation before.
const HOSTS_MAX: usize = 64;
/// Longest configuration, secret or certificate file; a larger one is another file by mistake.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How long all files may take that are pipes: what writes to them may be a program that asks somebody. The master gives a
/// validation 30 s.
const PIPES_TIME: Duration = Duration::from_secs(10);

/// The file system of pipes without a name (`PIPEFS_MAGIC`, statfs(2)).
const PIPEFS: rustix::fs::FsWord = 0x5049_5045;

/// Validates, and fills the two inherited memfds; returns the exit code.
#[must_use]
pub fn run(args: &ConfigArgs) -> u8 {
    let loaded = match load(args) {
        Ok(loaded) => loaded,
        Err(mistakes) => {
            report(&mistakes);
            return code::CONFIG;
        }
    };
    warn(&loaded.warnings);
    match hand_over(&loaded) {
        Ok(()) => code::OK,
        Err(error) => {
            eprintln!("evergate: cannot hand the configuration to the master: {error}");
            code::SYSTEM
        }
    }
}

fn hand_over(loaded: &Loaded) -> io::Result<()> {
    let plan = evergate_sys::adopt(inherit::COMPILE_PLAN)?;
    let sealed = evergate_sys::adopt(inherit::COMPILE_CONFIG)?;
    File::from(plan).write_all(loaded.plan.to_text().as_bytes())?;
    File::from(sealed).write_all(&serde_json::to_vec(&loaded.sealed)?)
}

/// Finds, reads and checks the configuration, with what core cannot check: certificates and the modes of files.
///
/// # Errors
/// Every mistake; a file that cannot be read is one.
pub fn load(args: &ConfigArgs) -> Result<Loaded, Vec<Mistake>> {
    let until = Instant::now() + PIPES_TIME;
    let read_file = |path: &Path| read_file(path, until);
    let path = match &args.config {
        Some(path) => Some(path.as_path()),
        None => Some(Path::new(FILE_DEFAULT)).filter(|path| path.exists()),
    };
    let name = path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    let text = match path.map(read_file).transpose() {
        Ok(text) => text,
        Err(why) => return Err(vec![whole_file(&name, format!("cannot be read: {why}"))]),
    };
    let dir = path.and_then(Path::parent).map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default();
    let source = text.as_deref().map(|text| Source { name: &name, text, dir: &dir });
    let facts = Facts {
        env: &|name| std::env::var(name).ok(),
        cpus: std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
        read_file: &|path| read_file(Path::new(path)),
    };
    let mut loaded = config::load(source.as_ref(), &args.overrides(), &facts)?;
    let checks = [check_tls, check_roots, check_programs];
    checks.into_iter().try_for_each(|check| check(&loaded.sealed)).map_err(|why| vec![whole_file(&name, why)])?;
    loaded.warnings.extend(exposed(&loaded.sealed));
    loaded.warnings.extend(descriptors::warning(&loaded.sealed.config));
    Ok(loaded)
}

fn whole_file(name: &str, message: String) -> Mistake {
    Mistake { source: name.to_owned(), line: 0, column: 0, message }
}

/// A whole text file of at most 1 MiB; a pipe may be one, such as a shell's `<(...)`.
fn read_file(path: &Path, until: Instant) -> Result<String, String> {
    let mut bytes = Vec::new();
    read_whole(path, until, &mut bytes).map_err(|error| plain(&error))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > FILE_BYTES_MAX) {
        return Err("it is larger than 1 MiB".into());
    }
    String::from_utf8(bytes).map_err(|error| format!("it is not UTF-8 (byte {})", error.utf8_error().valid_up_to()))
}

fn read_whole(path: &Path, until: Instant, bytes: &mut Vec<u8>) -> io::Result<()> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    // A pipe with a name may have no writer yet, and then looks as if it were at its end; one without has had its own.
    if file.metadata()?.file_type().is_fifo() && rustix::fs::fstatfs(&file)?.f_type != PIPEFS {
        await_writer(&file, until)?;
    }
    let mut file = file.take(FILE_BYTES_MAX + 1);
    loop {
        // What was read before an error is kept.
        match file.read_to_end(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => await_writer(file.get_ref(), until)?,
            outcome => return outcome.map(drop),
        }
    }
}

/// Waits for something to read, or for the end.
fn await_writer(file: &File, until: Instant) -> io::Result<()> {
    loop {
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&left)) {
            Ok(0) => {
                let seconds = PIPES_TIME.as_secs();
                return Err(io::Error::other(format!(
                    "it is a pipe, and nobody has written it to its end within {seconds} s"
                )));
            }
            Err(Errno::INTR) => {}
            outcome => return Ok(outcome.map(drop)?),
        }
    }
}

/// The system's words without the error's number, which says nothing to an operator.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

/// Whether certificate and key can be used and belong together.
fn check_tls(sealed: &Sealed) -> Result<(), String> {
    let Some(names) = &sealed.config.server.tls else { return Ok(()) };
    let pem = |path: &str| sealed.files.get(path).map(String::as_str).unwrap_or_default();
    match tls::acceptor(pem(&names.cert), pem(&names.key)) {
        Ok(_) => Ok(()),
        Err(why) => Err(format!("[server] tls with \"{}\" and \"{}\" cannot be used: {why}", names.cert, names.key)),
    }
}

/// Whether the certificate authorities that upstreams name in files can be used.
fn check_roots(sealed: &Sealed) -> Result<(), String> {
    for (name, upstream) in &sealed.config.upstreams {
        if let Roots::File(path) = &upstream.roots {
            let trust = Trust::new(upstream.roots.clone(), sealed.files.get(path).cloned());
            trust.check().map_err(|why| format!("[upstreams.{name}] roots: {why}"))?;
        }
    }
    Ok(())
}

/// Whether there is room for the programs.
fn check_programs(sealed: &Sealed) -> Result<(), String> {
    let count = sealed.config.upstreams.values().filter(|upstream| upstream.process.is_some()).count();
    if count > HOSTS_MAX {
        return Err(format!("{count} upstreams have a program; {HOSTS_MAX} at most can"));
    }
    Ok(())
}

/// Files with secrets in them that everybody on this machine can read.
fn exposed(sealed: &Sealed) -> Vec<String> {
    let secrets = sealed.secrets.keys().filter_map(|name| name.strip_prefix("file:"));
    let keys = sealed.config.server.tls.iter().map(|names| names.key.as_str());
    let is_exposed =
        |path: &&str| std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o004 != 0);
    secrets
        .chain(keys)
        .filter(is_exposed)
        .map(|path| format!("{path}: holds a secret and can be read by every user; chmod 600 it"))
        .collect()
}

/// Says every mistake on a line of its own, and how many there are.
pub(crate) fn report(mistakes: &[Mistake]) {
    for mistake in mistakes {
        eprintln!("{mistake}");
    }
    let count = mistakes.len();
    eprintln!("evergate: {count} {} in the configuration", if count == 1 { "mistake" } else { "mistakes" });
}

/// Says every warning on a line of its own.
pub(crate) fn warn(warnings: &[String]) {
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(folder: &Path, text: &str) -> Result<Loaded, Vec<Mistake>> {
        let path = folder.join("gate.toml");
        std::fs::write(&path, text).unwrap();
        load(&ConfigArgs { config: Some(path), ..ConfigArgs::default() })
    }

    const WITH_KEY: &str = "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { file = \"key\" }\n";

    #[test]
    fn a_missing_file_is_a_mistake_with_its_name() {
        let config = Some("/nowhere/x.toml".into());
        let mistakes = load(&ConfigArgs { config, ..ConfigArgs::default() }).unwrap_err();
        assert_eq!(mistakes[0].to_string(), "/nowhere/x.toml: cannot be read: no such file or directory");
    }

    #[test]
    fn secret_files_are_read_beside_the_file_and_their_modes_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key");
        std::fs::write(&key, "0123456789abcdef0123\n").unwrap();
        let set_mode = |mode| std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).unwrap();
        set_mode(0o644);
        let loaded = load_text(folder.path(), WITH_KEY).unwrap();
        assert!(loaded.warnings.iter().any(|text| text.contains("every user")), "{:?}", loaded.warnings);
        assert!(loaded.sealed.secrets.values().any(|value| value == "0123456789abcdef0123"));
        set_mode(0o600);
        let loaded = load_text(folder.path(), WITH_KEY).unwrap();
        assert_eq!(loaded.warnings, Vec::<String>::new());
    }

    #[test]
    fn strange_files_are_refused_with_a_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let read_file = |path: &Path| read_file(path, Instant::now() + PIPES_TIME);
        assert!(read_file(folder.path()).unwrap_err().contains("directory"));
        std::fs::write(&path, [b'a', 0xff]).unwrap();
        assert_eq!(read_file(&path).unwrap_err(), "it is not UTF-8 (byte 1)");
        std::fs::write(&path, vec![b'a'; (1 << 20) + 1]).unwrap();
        assert_eq!(read_file(&path).unwrap_err(), "it is larger than 1 MiB");
        std::fs::write(&path, vec![b'a'; 1 << 20]).unwrap();
        assert!(read_file(&path).is_ok());
    }
}
