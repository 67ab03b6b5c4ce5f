//! Resources that start in order and stop in reverse order, each within its own time.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

type Stop = Pin<Box<dyn Future<Output = ()> + Send>>;

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
    /// Resources started before it that could not be stopped in time.
    pub overrun: Vec<&'static str>,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} did not start: {}", self.resource, self.reason)?;
        if !self.overrun.is_empty() {
            write!(f, " (and did not stop in time: {})", self.overrun.join(", "))?;
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
        let reason = match tokio::time::timeout(bound, start).await {
            Ok(Ok((started, stop))) => {
                self.started.push((resource, bound, stop));
                return Ok(started);
            }
            Ok(Err(reason)) => reason,
            Err(_) => format!("not done within {} ms", bound.as_millis()),
        };
        let overrun = self.stop(bound).await;
        Err(Failed { resource, reason, overrun })
    }

    /// Stops everything in reverse order, each within its own bound and all within `total`; gives the names of those
    /// that ran out of time. What comes after `total` is not waited for but still dropped.
    pub async fn stop(&mut self, total: Duration) -> Vec<&'static str> {
        let end = tokio::time::Instant::now() + total;
        let mut overrun = Vec::new();
        while let Some((resource, bound, stop)) = self.started.pop() {
            let until = end.min(tokio::time::Instant::now() + bound);
            if tokio::time::timeout_at(until, stop).await.is_err() {
                overrun.push(resource);
            }
        }
        overrun
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
            assert_eq!(lifespan.stop(5 * SECOND).await, ["stuck"]);
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
