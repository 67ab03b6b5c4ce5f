//! `tr`, and the references of the stdio protocol.

use evergate_testkit::raw::{Raw, post_request};

use crate::{LIMIT, ask, can, end, examples, gateway, needs_python, said, streamed, tour};

pub(crate) fn a_command_shouts() -> Result<(), String> {
    let gateway = tour();
    assert_eq!(said(&ask(&gateway, "shout", "say hello", false)), "SAY HELLO");
    assert_eq!(streamed(&ask(&gateway, "shout", "say hello", true)), "SAY HELLO");
    end(gateway);
    Ok(())
}

pub(crate) fn python_answers() -> Result<(), String> {
    needs_python()?;
    answers(r#"["python3", "stdio_model.py"]"#);
    Ok(())
}

/// Node.js takes the types out by itself from 22.18 on, from 22.6 on where it is told to.
pub(crate) fn typescript_answers() -> Result<(), String> {
    let argv = if can("node", &["-e", "process.exit(process.features.typescript ? 0 : 1)"]) {
        r#"["node", "stdio_model.ts"]"#
    } else if can("node", &["--experimental-strip-types", "-e", "0"]) {
        r#"["node", "--experimental-strip-types", "stdio_model.ts"]"#
    } else {
        return Err("there is no node that runs TypeScript (22.6 or newer)".into());
    };
    answers(argv);
    Ok(())
}

/// It says the last message, word by word.
fn answers(argv: &str) {
    let dir = examples();
    let gateway = gateway(&format!(
        "[upstreams.kept]\nprocess = {{ mode = \"stdio\", argv = {argv}, dir = \"{}\", pass_env = [\"PATH\"] }}\n",
        dir.display()
    ));
    for round in 0..3 {
        let text = format!("every word of {round}");
        assert_eq!(said(&ask(&gateway, "kept/x", &text, false)), text);
        assert_eq!(streamed(&ask(&gateway, "kept/x", &text, true)), text);
    }
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request("/v1/embeddings", "", r#"{"model":"kept/x","input":"x"}"#));
    let refused = raw.read_response(LIMIT);
    assert_eq!(
        (refused.status, refused.json()["error"]["message"].as_str()),
        (400, Some("this model makes no embeddings"))
    );
    assert_eq!(gateway.model("kept")["restarts"], 0);
    end(gateway);
}
