//! Resources that start in order and stop in reverse order, each within its own time.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use crate::tasks::Caught;

/// What stops a resource.
pub type Stop = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Started resources, in order.
#[derive(Default)]
pub struct Lifespan {
    started: Vec<(&'static str, Duration, Stop)>,
}

/// Why a start ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Failed {
    /// Which resource.
    pub resource: &'static str,
    /// What it said.
    pub reason: String,
    /// How stopping what had started before it went.
    pub left: Left,
}

/// What did not stop as it should.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Out of time.
    pub overrun: Vec<&'static str>,
    /// Panicked; the others were stopped all the same.
    pub panicked: Vec<&'static str>,
}

impl Left {
    /// Whether everything has stopped as it should.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.overrun.is_empty() && self.panicked.is_empty()
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gap = "";
        for (what, names) in [("out of time", &self.overrun), ("panicked", &self.panicked)] {
            if !names.is_empty() {
                write!(f, "{gap}{what}: {}", names.join(", "))?;
                gap = "; ";
            }
        }
        Ok(())
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} did not start: {}", self.resource, self.reason)?;
        if !self.left.is_nothing() {
            write!(f, " (stopping what had started: {})", self.left)?;
        }
        Ok(())
    }
}

impl Lifespan {
    /// Starts one resource within `bound`; `start` gives the resource and what stops it.
    ///
    /// # Errors
    /// When it fails or takes longer; everything that had started is stopped first, in reverse order.
    pub async fn start<T>(
        &mut self,
        resource: &'static str,
        bound: Duration,
        start: impl Future<Output = Result<(T, Stop), String>>,
    ) -> Result<T, Failed> {
        let reason = match tokio::time::timeout(bound, Caught::of(Box::pin(start))).await {
            Ok(Ok(Ok((started, stop)))) => {
                self.started.push((resource, bound, stop));
                return Ok(started);
            }
            Ok(Ok(Err(reason))) => reason,
            Ok(Err(_)) => "it panicked".to_owned(),
            Err(_) => format!("not done within {} ms", bound.as_millis()),
        };
        let left = self.stop(bound).await;
        Err(Failed { resource, reason, left })
    }

    /// Stops everything in reverse order, each within its own bound and all within `total`. What comes after `total` is
    /// not waited for but still begun, and dropped.
    pub async fn stop(&mut self, total: Duration) -> Left {
        let end = tokio::time::Instant::now() + total;
        let mut left = Left::default();
        while let Some((resource, bound, stop)) = self.started.pop() {
            let until = end.min(tokio::time::Instant::now() + bound);
            match tokio::time::timeout_at(until, Caught::of(stop)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => left.panicked.push(resource),
                Err(_) => left.overrun.push(resource),
            }
        }
        left
    }
}

/// A stop that has nothing to do.
#[must_use]
pub fn nothing() -> Stop {
    Box::pin(std::future::ready(()))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(future)
    }

    fn resource(log: &Arc<Mutex<Vec<&'static str>>>, name: &'static str) -> Result<((), Stop), String> {
        log.lock().unwrap().push(name);
        let log = Arc::clone(log);
        Ok(((), Box::pin(async move { log.lock().unwrap().push("stop") })))
    }

    #[test]
    fn stops_in_reverse_and_names_what_overran() {
        run(async {
            let log = Arc::default();
            let mut lifespan = Lifespan::default();
            lifespan.start("first", SECOND, async { resource(&log, "first") }).await.unwrap();
            let stuck = async { Ok(((), Box::pin(std::future::pending()) as Stop)) };
            lifespan.start("stuck", SECOND, stuck).await.unwrap();
            let left = lifespan.stop(5 * SECOND).await;
            assert_eq!((left.overrun.as_slice(), left.panicked.len()), (&["stuck"][..], 0));
            assert_eq!(*log.lock().unwrap(), ["first", "stop"]);
        });
    }

    #[test]
    fn a_panic_in_a_stop_or_a_start_keeps_nobody_else_from_stopping() {
        run(async {
            let log = Arc::default();
            let mut lifespan = Lifespan::default();
            lifespan.start("first", SECOND, async { resource(&log, "first") }).await.unwrap();
            fn explode() {
                panic!("made for the test");
            }
            let bomb = async move { Ok(((), Box::pin(async move { explode() }) as Stop)) };
            lifespan.start("bomb", SECOND, bomb).await.unwrap();
            let failed =
                lifespan.start::<()>("third", SECOND, async { panic!("made for the test") }).await.unwrap_err();
            assert_eq!(
                failed.to_string(),
                "third did not start: it panicked (stopping what had started: panicked: bomb)"
            );
            assert_eq!(*log.lock().unwrap(), ["first", "stop"]);
        });
    }

    #[test]
    fn a_failed_start_stops_what_had_started_and_says_why() {
        run(async {
            let log = Arc::default();
            let mut lifespan = Lifespan::default();
            lifespan.start("first", SECOND, async { resource(&log, "first") }).await.unwrap();
            let failed = lifespan.start::<()>("second", SECOND, async { Err("no luck".into()) }).await.unwrap_err();
            assert_eq!(failed.to_string(), "second did not start: no luck");
            assert_eq!(*log.lock().unwrap(), ["first", "stop"]);
            let slow = lifespan.start::<()>("slow", SECOND, std::future::pending()).await.unwrap_err();
            assert_eq!(slow.reason, "not done within 1000 ms");
        });
    }
}
