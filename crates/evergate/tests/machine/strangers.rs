//! Who may give the master orders (SUPERVISION.md 7, line 31).

use std::fs::{Permissions, set_permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread;

use evergate_testkit::Evergate;
use rustix::process::{Uid, geteuid};
use rustix::thread::set_thread_res_uid;

use crate::{EXE, LIMIT};

/// The folder's mode and the socket's keep other users out. Both are taken away here: what is left is the look at who asks.
pub fn another_user_is_not_listened_to() -> Result<(), String> {
    if !geteuid().is_root() {
        return Err("only root can become another user".into());
    }
    let gateway = Evergate::builder(EXE).start();
    let folder = gateway.state_dir();
    let socket = folder.join("control.sock");
    for (path, mode) in [(folder.parent().unwrap(), 0o755), (folder, 0o755), (socket.as_path(), 0o666)] {
        set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    let ask = |user: u32, line: &'static str| {
        let (socket, user) = (socket.clone(), Uid::from_raw(user));
        // On Linux a thread has a user of its own, and the socket keeps whose thread has connected it.
        let asking = thread::spawn(move || {
            set_thread_res_uid(user, user, user).unwrap();
            let mut socket = UnixStream::connect(socket).unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            let mut answer = String::new();
            // It may be closed, or reset, before the line is sent.
            let _ = socket.write_all(line.as_bytes());
            let _ = socket.read_to_string(&mut answer);
            answer
        });
        asking.join().unwrap()
    };
    for line in ["ping\n", "status\n", "reload\n", "stop now\n"] {
        assert_eq!(ask(65534, line), "", "{line}");
    }
    assert_eq!(ask(0, "ping\n"), "ok\n");
    let run = gateway.run();
    assert_eq!((run["phase"].as_str(), run["generation"].as_u64()), (Some("serving"), Some(1)));
    assert!(gateway.exits().is_empty());
    Ok(())
}
