//! D6: a machine without a free port.

use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, Raw};
use serde_json::Value;

use crate::{EXE, LIMIT, can};

/// A network of its own in which every port that connect(2) may choose is reserved.
const NO_PORTS: &str =
    "ip link set lo up && echo 1024-65535 > /proc/sys/net/ipv4/ip_local_reserved_ports && exec \"$@\"";
/// One without an address of IPv6, as most containers have.
const NO_IPV6: &str = "ip link set lo up && ip -6 address flush dev lo && exec \"$@\"";

pub fn none_free_is_overload() -> Result<(), String> {
    let wrapper = |script| ["unshare", "--net", "/bin/sh", "-c", script, "sh"];
    let probe = wrapper(NO_PORTS);
    if !can(probe[0], &[&probe[1..], &["true"]].concat()) {
        return Err("a network namespace is not allowed here, or there is no ip(8)".into());
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("front.sock");
    let config = |host: &str| {
        format!(
            "[server]\nlisten = [\"unix:{}\"]\n[admin]\nlisten = \"\"\n[upstreams.fake]\nbase_url = \"http://{host}:9/v1\"\n",
            socket.display()
        )
    };
    // The same error of connect(2), another answer.
    let cases = [(NO_PORTS, "127.0.0.1", 503, "overloaded"), (NO_IPV6, "[::1]", 502, "upstream_connect_failed")];
    for (script, host, status, code) in cases {
        let mut gateway = Evergate::builder(EXE).wrapper(&wrapper(script)).config(config(host)).start();
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&post_request(
            "/v1/chat/completions",
            "x-request-id: d6\r\n",
            &chat_body("fake/ok", false, &Value::Null),
        ));
        let response = raw.read_response(LIMIT);
        assert_eq!((response.status, response.error_code().as_str()), (status, code), "{}", response.text());
        assert_eq!(response.header("x-should-retry"), Some("true"));
        let record = gateway.wait_access("d6", LIMIT);
        assert_eq!(record["cause"], code);
        assert!(record["detail"].as_str().is_some_and(|detail| detail.contains("(os error 99)")), "{record}");
        gateway.signal(rustix::process::Signal::TERM);
        assert!(gateway.wait_exit(LIMIT).success());
    }
    Ok(())
}
