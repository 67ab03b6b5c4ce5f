//! One connection's thread: takes requests and plays their scripts.

use std::time::{Duration, Instant};

use super::log::{Connection, End, How, Log, Recorded};
use super::request::Request;
use super::steps::{Step, plan};
use crate::link::{EndHandle, Gone, Link, Wait};

/// How often a held request looks whether it was released.
const HOLD_POLL: Duration = Duration::from_millis(2);

/// An idle connection is kept as long as any test runs.
const IDLE: Duration = Duration::from_secs(600);

/// What came of a script.
enum Played {
    ToTheEnd,
    Close,
    Reset,
    Left(Gone),
}

/// Serves one connection until it ends.
pub(super) fn serve(mut link: Link, log: &Log) {
    let handle = link.end_handle().ok();
    let number = log.change(|state| {
        state.connections.push(Connection { opened: Instant::now(), requests: 0, end: None });
        state.handles.push(handle);
        if state.is_over {
            // Accepted while the fake was being dropped: nobody would end it later.
            state.handles.iter().flatten().for_each(EndHandle::end);
        }
        state.connections.len() - 1
    });
    let how = serve_requests(&mut link, log, number);
    // Dropped before the record says so: a test that sees the end may count descriptors.
    log.change(|state| state.handles[number] = None);
    if how == Some(How::Broken) {
        link.reset();
    } else {
        link.close();
    }
    let end = End { at: Instant::now(), how: how.unwrap_or(How::Answered) };
    log.change(|state| state.connections[number].end = Some(end));
}

/// How the connection ended: by the client, by a reset of ours (`Broken`), or in order by us (`None`).
fn serve_requests(link: &mut Link, log: &Log, number: usize) -> Option<How> {
    loop {
        let request = match next_request(link) {
            Ok(request) => request,
            Err(how) => return how,
        };
        let index = log.change(|state| {
            state.connections[number].requests += 1;
            let recorded =
                Recorded { request: request.clone(), connection: number, arrived: Instant::now(), end: None };
            state.requests.push(recorded);
            state.working += 1;
            state.working_most = state.working_most.max(state.working);
            state.requests.len() - 1
        });
        let staged = log.look(|state| state.staged.get(&request.model()).cloned());
        let played = play(link, log, &staged.unwrap_or_else(|| plan(&request, index, number)));
        let how = match &played {
            Played::ToTheEnd => How::Answered,
            Played::Close | Played::Reset => How::Broken,
            Played::Left(gone) => How::from(*gone),
        };
        log.change(|state| state.requests[index].end = Some(End { at: Instant::now(), how }));
        match played {
            Played::ToTheEnd => {}
            Played::Close => return None,
            Played::Reset => return Some(How::Broken),
            Played::Left(gone) => return Some(gone.into()),
        }
    }
}

fn next_request(link: &mut Link) -> Result<Request, Option<How>> {
    loop {
        match Request::take(&mut link.inbox) {
            Ok(Some(request)) => return Ok(request),
            Ok(None) => {}
            Err(reason) => {
                let body = format!("HTTP/1.1 400 As Told\r\ncontent-length: {}\r\n\r\n{reason}", reason.len());
                let _ = link.write_all(body.as_bytes());
                return Err(None);
            }
        }
        match link.wait(Instant::now() + IDLE) {
            Wait::Data => {}
            Wait::Time => return Err(None),
            Wait::Gone(gone) => return Err(Some(gone.into())),
        }
    }
}

fn play(link: &mut Link, log: &Log, steps: &[Step]) -> Played {
    let mut work = Work(Some(log));
    let is_done = |step: &Step| matches!(step, Step::Send(bytes) if bytes.ends_with(b"[DONE]\n\n\r\n"));
    let is_send = |step: &Step| matches!(step, Step::Send(_));
    let last = steps.iter().position(is_done).or_else(|| steps.iter().rposition(is_send));
    for (index, step) in steps.iter().enumerate() {
        if Some(index) == last {
            work.end();
        }
        let outcome = match step {
            Step::Send(bytes) => link.write_all(bytes),
            Step::Pause(time) => link.pause(*time),
            Step::Hold => hold(link, log),
            Step::Silence => link.pause(IDLE),
            Step::Repeat(bytes, pause) => repeat(link, bytes, *pause),
            Step::Close => return Played::Close,
            Step::Reset => return Played::Reset,
        };
        if let Err(gone) = outcome {
            return Played::Left(gone);
        }
    }
    Played::ToTheEnd
}

/// A request that is being worked on.
struct Work<'a>(Option<&'a Log>);

impl Work<'_> {
    fn end(&mut self) {
        if let Some(log) = self.0.take() {
            log.change(|state| state.working -= 1);
        }
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

fn hold(link: &mut Link, log: &Log) -> Result<(), Gone> {
    while !log.look(|state| state.is_released) {
        link.pause(HOLD_POLL)?;
    }
    Ok(())
}

fn repeat(link: &mut Link, bytes: &[u8], pause: Duration) -> Result<(), Gone> {
    loop {
        link.write_all(bytes)?;
        link.pause(pause)?;
    }
}
