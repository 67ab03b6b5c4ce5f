//! The list of models and its items.

use std::fmt::Write as _;

use crate::json::write_string;

/// A `ListModelsResponse` of these names, all with the same `created`, Unix seconds.
pub fn models_list<'a>(names: impl IntoIterator<Item = &'a str>, created: u64) -> String {
    let mut out = String::from("{\"object\":\"list\",\"data\":[");
    for (number, name) in names.into_iter().enumerate() {
        if number > 0 {
            out.push(',');
        }
        write_model(&mut out, name, created);
    }
    out.push_str("]}");
    out
}

/// A `Model`; `created` in Unix seconds.
#[must_use]
pub fn model(name: &str, created: u64) -> String {
    let mut out = String::new();
    write_model(&mut out, name, created);
    out
}

fn write_model(out: &mut String, name: &str, created: u64) {
    out.push_str("{\"id\":");
    write_string(out, name);
    // Writing to a string cannot fail.
    let _ = write!(out, ",\"object\":\"model\",\"created\":{created},\"owned_by\":\"evergate\"}}");
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn models_have_every_required_field() {
        let one = json!({ "id": "a\"/b", "object": "model", "created": 7, "owned_by": "evergate" });
        assert_eq!(serde_json::from_str::<Value>(&model("a\"/b", 7)).unwrap(), one);
        let list: Value = serde_json::from_str(&models_list(["a\"/b", "a\"/b"], 7)).unwrap();
        assert_eq!(list, json!({ "object": "list", "data": [one, one] }));
        assert_eq!(models_list([], 7), r#"{"object":"list","data":[]}"#);
    }
}
