//! The list of models and its items.

use std::fmt::Write as _;

use crate::json::write_string;

/// A model as it is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed<'a> {
    /// Its name.
    pub name: &'a str,
    /// What the program that serves it is doing; none where that is no program of this machine. The schema of the API
    /// knows no such field, and forbids none.
    pub state: Option<&'a str>,
}

/// A `ListModelsResponse` of these models, all with the same `created`, Unix seconds.
pub fn models_list<'a>(models: impl IntoIterator<Item = Listed<'a>>, created: u64) -> String {
    let mut out = String::from("{\"object\":\"list\",\"data\":[");
    for (number, listed) in models.into_iter().enumerate() {
        if number > 0 {
            out.push(',');
        }
        write_model(&mut out, &listed, created);
    }
    out.push_str("]}");
    out
}

/// A `Model`; `created` in Unix seconds.
#[must_use]
pub fn model(listed: &Listed<'_>, created: u64) -> String {
    let mut out = String::new();
    write_model(&mut out, listed, created);
    out
}

fn write_model(out: &mut String, listed: &Listed<'_>, created: u64) {
    out.push_str("{\"id\":");
    write_string(out, listed.name);
    // Writing to a string cannot fail.
    let _ = write!(out, ",\"object\":\"model\",\"created\":{created},\"owned_by\":\"evergate\"");
    if let Some(state) = listed.state {
        out.push_str(",\"state\":");
        write_string(out, state);
    }
    out.push('}');
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn models_have_every_required_field() {
        let one = json!({ "id": "a\"/b", "object": "model", "created": 7, "owned_by": "evergate" });
        let listed = Listed { name: "a\"/b", state: None };
        assert_eq!(serde_json::from_str::<Value>(&model(&listed, 7)).unwrap(), one);
        let program = Listed { name: "p", state: Some("cold") };
        let two = json!({ "id": "p", "object": "model", "created": 7, "owned_by": "evergate", "state": "cold" });
        let list: Value = serde_json::from_str(&models_list([listed, program], 7)).unwrap();
        assert_eq!(list, json!({ "object": "list", "data": [one, two] }));
        assert_eq!(models_list([], 7), r#"{"object":"list","data":[]}"#);
    }
}
