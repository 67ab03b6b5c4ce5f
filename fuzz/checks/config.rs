//! A configuration file: whatever it says, it is refused with its places, or loads again from what it came to.

use evergate_core::config::{Facts, Loaded, Mistake, Overrides, Source, effective, load};

const NAME: &str = "fuzz.toml";

/// The bytes are the file.
pub fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match read(text) {
        Ok(loaded) => {
            let config = &loaded.sealed.config;
            let written = effective(config);
            let again =
                read(&written).unwrap_or_else(|mistakes| panic!("refused what it wrote: {mistakes:?}\n{written}"));
            assert_eq!(effective(&again.sealed.config), written);
            assert!(again.sealed.config == *config, "it loads to another configuration:\n{written}");
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty(), "refused without a word");
            for mistake in mistakes {
                assert!(!mistake.message.is_empty() && !mistake.message.contains('\n'), "{mistake}");
                assert!(mistake.source != NAME || mistake.line <= text.split('\n').count(), "{mistake}");
            }
        }
    }
}

fn read(text: &str) -> Result<Loaded, Vec<Mistake>> {
    let env = |name: &str| name.len().is_multiple_of(2).then(|| format!("a-secret-value-of-{name}"));
    let read_file =
        |path: &str| if path.len().is_multiple_of(2) { Ok("file".to_owned()) } else { Err("no such file".to_owned()) };
    let facts = Facts { env: &env, cpus: 4, read_file: &read_file };
    load(Some(&Source { name: NAME, text, dir: "" }), &Overrides::default(), &facts)
}
