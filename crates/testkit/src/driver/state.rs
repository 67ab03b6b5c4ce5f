//! Reading the state folder.

use std::path::Path;

use serde_json::Value;

use super::process::Child;

/// The run file; null when there is none, or when it is not whole, which a reader must not see.
pub(super) fn run_file(state_dir: &Path) -> Value {
    match std::fs::read(state_dir.join("run.json")) {
        Ok(bytes) => serde_json::from_slice(&bytes).expect("run.json is replaced as a whole"),
        Err(_) => Value::Null,
    }
}

/// The public addresses of a run file.
pub(super) fn addresses(run: &Value) -> Vec<String> {
    let listen = run["listen"].as_array();
    listen.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// The children of a run file.
pub(super) fn children(run: &Value) -> Vec<Child> {
    let children = run["children"].as_array();
    let child = |value: &Value| Child {
        kind: value["kind"].as_str().unwrap_or_default().to_owned(),
        pid: value["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a child's pid in run.json"),
        slot: value["slot"].as_u64().unwrap_or_default(),
        row: value["row"].as_u64().unwrap_or_default(),
        epoch: value["epoch"].as_u64().unwrap_or_default(),
        generation: value["generation"].as_u64().unwrap_or_default(),
    };
    children.into_iter().flatten().map(child).collect()
}

/// The whole lines of a JSON-lines file, the rotated part before the present one.
pub(super) fn lines(state_dir: &Path, name: &str) -> Vec<Value> {
    let mut values = Vec::new();
    for name in [format!("{name}.1"), name.to_owned()] {
        let Ok(text) = std::fs::read_to_string(state_dir.join(name)) else { continue };
        // A line without an end is being written.
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            values.push(serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}")));
        }
    }
    values
}
