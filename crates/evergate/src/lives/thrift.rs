//! What a worker gives up by itself when memory is short, and says of it (J3). What it refuses is `gate/memory.rs`'s.

use std::time::{Duration, Instant};

use evergate_core::memory::Rung;

use crate::http::app::App;
use crate::telemetry::names::Spared;
use crate::telemetry::talk;

/// Between two lines about it.
const SAY: Duration = Duration::from_secs(10);

/// What was said last, and when.
#[derive(Debug, Default)]
pub(super) struct Thrift {
    said: Option<(Rung, Instant)>,
}

impl Thrift {
    /// Looks at the memory, once a beat.
    pub(super) fn look(&mut self, app: &App) {
        let rung = app.memory.look();
        if rung >= Rung::Close {
            app.clients.values().for_each(|client| client.close_idle());
            app.gate.shed_idle(app.sealed.config.timeouts.client_idle);
        }
        // One a beat: what it held is given back before the next look.
        if rung >= Rung::Most && app.gate.end_most() {
            app.memory.count(Spared::UnderWay);
        }
        self.say(app, rung);
    }

    /// A rung that was not reached before is said at once, going down again not more often than every ten seconds.
    fn say(&mut self, app: &App, rung: Rung) {
        let (last, at) = self.said.map_or((Rung::Calm, None), |(last, at)| (last, Some(at)));
        let is_due = rung > last || (rung < last && at.is_none_or(|at| at.elapsed() >= SAY));
        if is_due {
            self.said = Some((rung, Instant::now()));
            talk::print(&format!("evergate worker: {}: {}", app.memory, rung.says()));
        }
    }
}
