//! The master's life: what `evergate serve` hands to the supervisor.

use std::ffi::OsString;
use std::path::Path;

use evergate_core::inherit::code;
use evergate_supervisor::Options;

use super::STATE_DIR_VARIABLE;
use crate::cli::ConfigArgs;
use crate::telemetry::names;

/// `close_range`, `pidfd` and memfd seals as we use them are all there from this one on.
const KERNEL_MIN: (u32, u32) = (5, 10);

/// What children may see of the environment. Keys of upstreams are not in it: they travel in the sealed configuration.
const VARIABLES: [&str; 6] = ["PATH", "HOME", "TZ", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR"];
/// Fault injection of debug builds.
const FAULT_PREFIX: &str = "EVERGATE_FAULT";

/// Runs the gateway until it is stopped; returns the exit code.
#[must_use]
pub fn run(config: &ConfigArgs, halt_on_boot_error: bool, state_dir: &Path) -> u8 {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if kernel(&release).is_none_or(|kernel| kernel < KERNEL_MIN) {
        let (major, minor) = KERNEL_MIN;
        eprintln!("evergate: this kernel is Linux {release}; Evergate needs {major}.{minor} or newer");
        return code::SYSTEM;
    }
    evergate_supervisor::serve(&Options {
        state_dir: state_dir.to_owned(),
        compile_args: compile_args(config),
        halt_on_boot_error,
        child_env: child_env(std::env::vars_os(), state_dir),
        on_left: names::count_left,
        on_exit: names::count_exit,
        on_respawn: names::count_respawn,
        on_host_start: names::count_host_start,
    })
}

/// Major and minor number of a release such as `6.1.0-13-amd64`.
fn kernel(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|letter: char| !letter.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn compile_args(config: &ConfigArgs) -> Vec<OsString> {
    let mut args = vec![OsString::from("compile")];
    if let Some(path) = &config.config {
        args.extend(["--config".into(), path.into()]);
    }
    if let Some(address) = &config.listen {
        args.extend(["--listen".into(), address.into()]);
    }
    if let Some((min, max)) = config.workers {
        let text = max.map_or_else(|| min.to_string(), |max| format!("{min}:{max}"));
        args.extend(["--workers".into(), text.into()]);
    }
    args
}

fn child_env(all: impl Iterator<Item = (OsString, OsString)>, state_dir: &Path) -> Vec<(OsString, OsString)> {
    let is_allowed =
        |name: &OsString| name.to_str().is_some_and(|name| VARIABLES.contains(&name) || name.starts_with(FAULT_PREFIX));
    let mut env: Vec<_> = all.filter(|(name, _)| is_allowed(name)).collect();
    env.push((STATE_DIR_VARIABLE.into(), state_dir.into()));
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_read() {
        assert_eq!(kernel("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(kernel("5.10"), Some((5, 10)));
        assert!(kernel("5.4.0").unwrap() < KERNEL_MIN);
        assert_eq!(kernel("strange"), None);
    }

    #[test]
    fn children_get_no_key_from_the_environment() {
        let all = [("PATH", "/bin"), ("OPENAI_API_KEY", "sk"), ("EVERGATE_API_KEY", "k"), ("EVERGATE_FAULT", "1")];
        let env = child_env(all.iter().map(|(name, value)| (name.into(), value.into())), Path::new("/s"));
        let names: Vec<_> = env.iter().map(|(name, _)| name.to_str().unwrap()).collect();
        assert_eq!(names, ["PATH", "EVERGATE_FAULT", "EVERGATE_STATE_DIR"]);
    }

    #[test]
    fn flags_are_handed_on() {
        let config =
            ConfigArgs { config: Some("x".into()), listen: Some("unix:/y".into()), workers: Some((1, Some(2))) };
        let args = compile_args(&config);
        assert_eq!(args, ["compile", "--config", "x", "--listen", "unix:/y", "--workers", "1:2"]);
        assert_eq!(compile_args(&ConfigArgs::default()), ["compile"]);
    }
}
