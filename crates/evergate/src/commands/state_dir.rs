//! Where the state folder is, for the master and for whoever asks it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Who we are, as far as it matters for the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// The superuser.
    Root,
    /// Anybody else.
    Other,
}

/// The effective user.
#[must_use]
pub fn user() -> User {
    if rustix::process::geteuid().is_root() { User::Root } else { User::Other }
}

/// The flag's folder, else `$XDG_STATE_HOME/evergate`, else root's `/var/lib/evergate`, else `~/.local/state/evergate`;
/// always absolute. Relative values in the environment do not count (XDG Base Directory Specification 0.8).
///
/// # Errors
/// Says what to do when there is no folder to be found.
pub fn choose(flag: Option<&Path>, env: &dyn Fn(&str) -> Option<OsString>, user: User) -> Result<PathBuf, String> {
    if let Some(flag) = flag {
        let why = |error| format!("cannot use the state folder \"{}\": {error}", flag.display());
        return std::path::absolute(flag).map_err(why);
    }
    let folder = |name| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(base) = folder("XDG_STATE_HOME") {
        return Ok(base.join("evergate"));
    }
    match (user, folder("HOME")) {
        (User::Root, _) => Ok("/var/lib/evergate".into()),
        (User::Other, Some(home)) => Ok(home.join(".local/state/evergate")),
        (User::Other, None) => Err("no place for the state folder: HOME is not set; name one with --state-dir".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(flag: Option<&str>, env: &[(&str, &str)], user: User) -> Result<PathBuf, String> {
        let get = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        choose(flag.map(Path::new), &get, user)
    }

    #[test]
    fn first_that_is_known_wins() {
        let both = [("XDG_STATE_HOME", "/x"), ("HOME", "/h")];
        let cases = [
            (Some("/flag"), &both[..], User::Root, "/flag"),
            (None, &both[..], User::Root, "/x/evergate"),
            (None, &both[1..], User::Root, "/var/lib/evergate"),
            (None, &both[1..], User::Other, "/h/.local/state/evergate"),
            (None, &[("XDG_STATE_HOME", "relative"), ("HOME", "/h")], User::Other, "/h/.local/state/evergate"),
        ];
        for (flag, env, user, folder) in cases {
            assert_eq!(chosen(flag, env, user), Ok(folder.into()));
        }
        assert!(chosen(Some("here"), &[], User::Other).unwrap().is_absolute());
        assert!(chosen(None, &[], User::Other).unwrap_err().contains("--state-dir"));
    }
}
