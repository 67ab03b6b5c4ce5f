//! Ends that are ordered: idle programs, their own stop command, deaf ones and families.

use std::time::{Duration, Instant};

use evergate_host::program::Ladder;
use evergate_sys::Status;

use super::model::{SERVES, body, given, serve};
use super::support::{LONG, exists, run, until};
use super::wire::read;

fn soon() -> Instant {
    Instant::now() + LONG
}

#[test]
fn one_that_is_preloaded_is_there_before_it_is_asked_for_and_stays() {
    run(|house| async move {
        let mut given = given(&SERVES);
        given.preload = true;
        let host = serve(&house, given);
        let pid = host.is_ready().await;
        assert_eq!(host.play("ok").await.status, 200);
        assert_eq!(host.is_ready().await, pid);
    });
}

#[test]
fn its_stop_command_comes_before_term() {
    run(|house| async move {
        let folder = super::support::folder();
        let stop = folder.path().join("stop");
        let mut given = given(&["serve:127.0.0.1:{port}", &format!("await:{}", stop.display()), "exit:0"]);
        let script = format!("echo $0 $1 > {path}.new && mv {path}.new {path}", path = stop.display());
        given.config.stop = ["sh", "-c", &script, "{pid}", "{port}"].map(str::to_owned).to_vec();
        given.plan.grace = LONG;
        let host = serve(&house, given);
        assert_eq!(host.play("ok").await.status, 200);
        let pid = host.is_ready().await;
        assert!(host.server.stop(soon()).await);
        let told = std::fs::read_to_string(&stop).unwrap();
        assert!(told.starts_with(&format!("{pid} ")), "{told}");
        let ended = house.ear.ended.lock().unwrap().clone();
        let own = ended.iter().find(|ended| ended.pid.as_raw_nonzero().get() == pid).unwrap();
        assert_eq!((own.ladder, own.exit.status), (Ladder::Untouched, Status::Code(0)));
        host.play("ok").await.assert_error(503, "server_shutting_down", "0");
    });
}

#[test]
fn a_stop_command_that_hangs_or_fails_is_no_reason_to_wait() {
    run(|house| async move {
        for command in [vec!["sleep", "100"], vec!["false"], vec!["/no/such/command"]] {
            let mut given = given(&SERVES);
            given.config.stop = command.iter().map(ToString::to_string).collect();
            let host = serve(&house, given);
            assert_eq!(host.play("ok").await.status, 200);
            let begin = Instant::now();
            assert!(host.server.stop(soon()).await);
            assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
            until("nothing is left", || house.programs.live() == 0).await;
        }
    });
}

#[test]
fn g8_one_that_is_deaf_to_term_is_killed_with_its_family() {
    run(|house| async move {
        let sim = evergate_testkit::adaptersim().display().to_string();
        let script = "trap '' TERM; exec \"$0\" fork:setsid:pid,hang fork:daemon:pid,hang serve:127.0.0.1:$1 hang";
        let mut given = given(&[]);
        given.plan = super::support::plan(&["sh", "-c", script, &sim, "{port}"]);
        let host = serve(&house, given);
        assert_eq!(host.play("ok").await.status, 200);
        let family = house.heard("pid ", 2).await;
        assert!(family.iter().all(|pid| exists(*pid)));
        assert!(host.server.stop(soon()).await);
        assert_eq!(house.ear.ended.lock().unwrap()[0].ladder, Ladder::Kill);
        assert!(!family.iter().any(|pid| exists(*pid)), "{family:?}");
    });
}

#[test]
fn a_stop_ends_a_start_and_tells_who_waits() {
    run(|house| async move {
        let host = serve(&house, given(&["pid", "hang"]));
        let waits = host.send("/v1/chat/completions", "", body("ok", false).to_string().as_bytes()).await;
        let pid = house.heard("pid ", 1).await[0];
        assert!(host.server.stop(soon()).await);
        read(waits).await.assert_error(503, "server_shutting_down", "0");
        assert!(!exists(pid));
    });
}

#[test]
fn a_host_that_is_dropped_ends_its_program() {
    run(|house| async move {
        let host = serve(&house, given(&SERVES));
        assert_eq!(host.play("ok").await.status, 200);
        let pid = host.is_ready().await;
        drop(host);
        until("it is gone", || !exists(pid)).await;
    });
}
