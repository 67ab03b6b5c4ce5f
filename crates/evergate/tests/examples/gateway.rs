//! A small Python gateway of the usual kind, which has every usual way to die.

use evergate_testkit::{Evergate, wait_for};
use serde_json::{Value, json};

use crate::{LIMIT, ask, end, needs_python, said, streamed, tour};

/// The word that has it die, what its client may be told, and who has ended it by the record: there is none where it goes on
/// living.
const WAYS: [(&str, &[&str], Option<&str>); 6] = [
    ("exit", &["upstream_disconnected", "adapter_exited", "adapter_protocol_error"], None),
    ("thread", &["adapter_timeout"], Some("host")),
    ("os-exit", &["adapter_exited"], Some("crash")),
    ("segfault", &["adapter_exited"], Some("crash")),
    ("memory", &["adapter_exited"], Some("crash")),
    ("hang", &["adapter_timeout"], Some("host")),
];

pub(crate) fn dies_in_every_way() -> Result<(), String> {
    needs_python()?;
    let gateway = tour();
    assert_eq!(said(&ask(&gateway, "chat", "hello", false)), "hello");
    assert_eq!(streamed(&ask(&gateway, "chat", "hello", true)), "hello");
    for (word, codes, on_record) in WAYS {
        let before = records(&gateway).len();
        let answer = ask(&gateway, "chat", word, false);
        let code = answer.error_code();
        assert!(matches!(answer.status, 502 | 504) && codes.contains(&&*code), "{word}: {}", answer.text());
        // Whoever comes next has an answer, from it or from its successor.
        assert_eq!(said(&ask(&gateway, "chat", "hello", false)), "hello", "after {word}");
        let Some(initiator) = on_record else { continue };
        let record = wait_for("its record", LIMIT, || records(&gateway).get(before).cloned());
        assert_eq!(record["initiator"], initiator, "{word}: {record}");
        let how = (record["code"].clone(), record["signal"].clone());
        match word {
            "os-exit" => assert_eq!(how, (json!(3), Value::Null)),
            "segfault" => assert_eq!(how, (Value::Null, json!(11))),
            "memory" => assert_eq!(how, (Value::Null, json!(6))),
            // Its host told it to go.
            _ => assert!(record["sent"].as_array().is_some_and(|sent| !sent.is_empty()), "{record}"),
        }
    }
    let text = gateway.printed(&["exits"]);
    for words in
        ["code 3", "signal 11 (SIGSEGV)", "signal 6 (SIGABRT)", "  RuntimeError: the only thread", "  MemoryError"]
    {
        assert!(text.contains(words), "no {words} in\n{text}");
    }
    end(gateway);
    Ok(())
}

/// Ends of the program, oldest first.
fn records(gateway: &Evergate) -> Vec<Value> {
    let all: Value = serde_json::from_str(&gateway.printed(&["exits", "--json"])).unwrap();
    let is_its = |record: &&Value| record["kind"] == "program" && record["upstream"] == "chat";
    all.as_array().unwrap().iter().filter(is_its).cloned().collect()
}
