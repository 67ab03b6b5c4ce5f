//! What the shell tells the rules, and what the rules tell the shell.

use std::time::Duration;

use evergate_board::{HostState, MasterPhase};
use evergate_core::exit::{Initiator, Kind, Status};
use evergate_core::plan::{HostPlan, Plan};

/// Monotonic nanoseconds.
pub type Ns = u64;

/// One second.
pub(crate) const SECOND: Ns = 1_000_000_000;
/// One millisecond.
pub(crate) const MS: Ns = 1_000_000;

/// The numbers of a configuration that the rules use; times in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Fewest workers.
    pub workers_min: u32,
    /// Most workers.
    pub workers_max: u32,
    /// Requests that a worker admits at once.
    pub slots: u32,
    /// Requests and connections waiting that call one worker more at once.
    pub backlog_high: u32,
    /// How long below a quarter of capacity before one worker goes.
    pub idle_after: Ns,
    /// Requests after which a worker is replaced; 0 is never.
    pub requests_max: u64,
    /// Age at which a worker is replaced; 0 is never.
    pub lifetime_max: Ns,
    /// Resident set at which a worker is replaced, KiB; 0 is never.
    pub rss_max_kib: u64,
    /// Resident set of all workers from which on none is added for load, KiB; 0 is none.
    pub rss_total_max_kib: u64,
    /// From start to ready.
    pub boot_timeout: Ns,
    /// Age of the last beat at which a child counts as hung.
    pub hang_timeout: Ns,
    /// Readiness says 503, still serving.
    pub settle: Ns,
    /// In-flight requests may finish.
    pub drain: Ns,
    /// Cancelled requests may say so.
    pub cancel: Ns,
    /// Resources may close.
    pub cleanup: Ns,
}

impl Rules {
    /// The rules of a plan.
    #[must_use]
    pub fn of_plan(plan: &Plan) -> Self {
        Self {
            workers_min: plan.workers_min,
            workers_max: plan.workers_max,
            slots: plan.slots,
            backlog_high: plan.backlog_high,
            idle_after: ns(plan.idle_after),
            requests_max: plan.requests_max.into(),
            lifetime_max: ns(plan.lifetime_max),
            rss_max_kib: plan.rss_max_kib,
            rss_total_max_kib: plan.rss_total_max_kib,
            boot_timeout: ns(plan.boot_timeout),
            hang_timeout: ns(plan.hang_timeout),
            settle: ns(plan.settle),
            drain: ns(plan.drain),
            cancel: ns(plan.cancel),
            cleanup: ns(plan.cleanup),
        }
    }

    /// What a child has from TERM to its end.
    #[must_use]
    pub fn graceful(&self) -> Ns {
        self.drain.saturating_add(self.quick())
    }

    /// What a child has from QUIT to its end: its own stages, and one second to be seen ending by itself.
    #[must_use]
    pub fn quick(&self) -> Ns {
        self.cancel.saturating_add(self.last())
    }

    /// What the clerk has.
    #[must_use]
    pub fn last(&self) -> Ns {
        self.cleanup.saturating_add(SECOND)
    }
}

fn ns(time: Duration) -> Ns {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4).min(u64::MAX / 4)
}

/// A program that serves a model, as its section of a configuration has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostRules {
    /// The upstream's name.
    pub name: String,
    /// Tells the section from every other.
    pub fingerprint: u64,
    /// Hosts of one group exclude each other.
    pub group: Option<String>,
    /// Started with the gateway, and not ended for being idle.
    pub is_preloaded: bool,
    /// May be started beside the one that it replaces.
    pub overlaps: bool,
    /// From its start until it takes requests.
    pub start: Ns,
    /// What its programs have from TERM to KILL, beyond what every child has.
    pub grace: Ns,
}

impl HostRules {
    /// The rules of a plan's line.
    #[must_use]
    pub fn of_plan(plan: &HostPlan) -> Self {
        Self {
            name: plan.name.clone(),
            fingerprint: plan.fingerprint,
            group: plan.group.clone(),
            is_preloaded: plan.is_preloaded,
            overlaps: plan.overlaps,
            start: ns(plan.start),
            grace: ns(plan.grace),
        }
    }
}

/// A configuration that may come into force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// Its numbers.
    pub rules: Rules,
    /// Its programs.
    pub hosts: Vec<HostRules>,
}

impl Next {
    /// What a plan says.
    #[must_use]
    pub fn of_plan(plan: &Plan) -> Self {
        Self { rules: Rules::of_plan(plan), hosts: plan.hosts.iter().map(HostRules::of_plan).collect() }
    }
}

impl From<Rules> for Next {
    fn from(rules: Rules) -> Self {
        Self { rules, hosts: Vec::new() }
    }
}

/// Whoever waits for an answer at the control socket.
pub type Caller = u64;

/// What an operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `TERM`: stop gracefully; a second one hastens.
    Term,
    /// `INT` or `QUIT`: stop quickly; during a stop, hasten it.
    Interrupt,
    /// `evergate stop`; said twice it does not hasten.
    Stop,
    /// `evergate stop --now`; said twice it does not hasten further.
    StopNow,
    /// `TTIN`: one worker more.
    More,
    /// `TTOU`: one worker less.
    Fewer,
    /// A number of workers wanted; whoever asked is answered.
    Scale {
        /// How many.
        workers: u32,
        /// Who asked.
        caller: Caller,
    },
    /// `HUP`, or somebody who waits for the outcome.
    Reload(Option<Caller>),
    /// Start a model's program; whoever asked is answered when it takes requests.
    Load {
        /// Of the upstream ([`super::name_hash`]).
        name: u64,
        /// Who asked.
        caller: Caller,
    },
    /// Stop a model's program; whoever asked is answered when it has gone.
    Unload {
        /// Of the upstream.
        name: u64,
        /// Who asked.
        caller: Caller,
    },
    /// `USR1`.
    ReopenLogs,
}

/// A child as the board shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Which child.
    pub epoch: u32,
    /// Whether its phase is `Ready` or a later one.
    pub is_ready: bool,
    /// Its last beat; 0 before the first.
    pub beat: Ns,
    /// How long its main thread has waited for a processor since its start; 0 while it beats, when nobody asks.
    pub starved: Ns,
    /// Whether it drains, or is beyond that, be it told to or not.
    pub is_going: bool,
    /// Whether it found the accept queue empty after it was told to stop.
    pub took_queue: bool,
    /// Weighted requests it has, without those that wait for an upstream.
    pub load: u32,
    /// Requests that wait in it for a slot.
    pub waiting: u32,
    /// How late its event loop was lately.
    pub lag: Ns,
    /// Requests it has taken since its start.
    pub requests: u64,
    /// Resident set, KiB.
    pub rss_kib: u64,
    /// Whether it loses descriptors and asks for a successor.
    pub is_leaking: bool,
}

/// A host as the board shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostSeen {
    /// Its row.
    pub host: u32,
    /// Whether somebody has asked for it since the last look.
    pub is_wanted: bool,
    /// The child that takes requests; 0 for none.
    pub ready_epoch: u32,
    /// The child that says that it may go; 0 for none.
    pub idle_epoch: u32,
    /// Whether it has requests.
    pub is_busy: bool,
    /// Whether its program has ended, and the next one is not ready yet.
    pub is_down: bool,
}

/// What is shown of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// What workers are to take it for.
    pub state: HostState,
    /// How often it came to a bad end.
    pub failures: u64,
    /// When a failed one is tried again.
    pub retry_at: Ns,
    /// Whether the configuration in force has another section of its name, or none.
    pub is_retired: bool,
    /// Why the last one came to a bad end; empty if none did.
    pub cause: String,
}

/// Why a reload did not come off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The exit code that says so.
    pub code: u8,
    /// In words; several lines if there are several mistakes.
    pub why: String,
}

impl Refusal {
    /// Something went wrong.
    pub fn failed(why: impl Into<String>) -> Self {
        Self { code: evergate_core::inherit::code::FAILED, why: why.into() }
    }
}

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The shell is ready to start children. Comes once, first.
    Start,
    /// The board was looked at; comes in every turn of the shell's loop, at least every half second.
    Seen {
        /// Every child that runs.
        children: Vec<Seen>,
        /// Connections in the TCP listeners' accept queues.
        queue: u32,
    },
    /// The hosts' rows were looked at; comes behind [`Self::Seen`] where there are any.
    Hosts(Vec<HostSeen>),
    /// Nothing is left of what a buried host has started, see [`Action::Sweep`].
    Swept {
        /// Of which.
        epoch: u32,
    },
    /// Somebody connects to a gateway that was quiet, see [`super::State::is_quiet`].
    Knock,
    /// A child could not be started.
    SpawnFailed {
        /// Which.
        epoch: u32,
        /// The system's words.
        why: String,
    },
    /// A child has ended and was reaped.
    Exited {
        /// Which.
        epoch: u32,
        /// How.
        status: Status,
        /// What it said about itself.
        note: String,
    },
    /// The validation that [`Action::Compile`] began has ended: the rules of the configuration, which the shell holds
    /// until it is told what to do with it, or why there are none.
    Compiled(Result<Next, Refusal>),
    /// An operator wants something.
    Order(Order),
}

/// A child to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Birth {
    /// What it is.
    pub kind: Kind,
    /// Its slot among its kind; a host's row among the hosts'.
    pub slot: u32,
    /// Its row on the board.
    pub row: u32,
    /// Its number within the run.
    pub epoch: u32,
    /// Generation of its configuration.
    pub generation: u32,
}

/// The signals that the rules send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sig {
    /// Finish what you have.
    Term,
    /// Cancel what you have.
    Quit,
    /// Die with a core, so that somebody can see where you hang.
    Abort,
    /// Die.
    Kill,
    /// Reopen your logs.
    Usr1,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tally {
    /// Workers added, for load or by an operator.
    ScaleUp,
    /// Workers taken away.
    ScaleDown,
    /// Generations that came into force after the first.
    Reload,
    /// Reloads that left everything as it was.
    ReloadFailed,
    /// A child started in place of one that had ended or was to be replaced.
    Respawn {
        /// What it is.
        kind: Kind,
        /// Why the other one went.
        cause: Initiator,
    },
    /// A host's start is over.
    HostStart {
        /// Its row.
        host: u32,
        /// How it came out.
        outcome: HostStart,
        /// From its birth on.
        took: Ns,
    },
}

/// How a host's start came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostStart {
    /// It takes requests.
    Ready,
    /// It came to a bad end first.
    Failed,
    /// It was told to go first.
    Stopped,
}

impl HostStart {
    /// All of them, in their order.
    pub const ALL: [Self; 3] = [Self::Ready, Self::Failed, Self::Stopped];

    /// The word in labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

/// Something is to be done, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a child in an empty row. [`Event::SpawnFailed`] follows if that is impossible.
    Spawn(Birth),
    /// Signal a child.
    Send {
        /// Which.
        epoch: u32,
        /// What.
        signal: Sig,
    },
    /// Record a child's end, account for what died with it and empty its row.
    Bury {
        /// Which.
        epoch: u32,
        /// Whose doing it was.
        initiator: Initiator,
    },
    /// Make a host's row and its socket.
    AddHost {
        /// Its row.
        host: u32,
        /// The upstream's name.
        name: String,
        /// Tells its section from every other.
        fingerprint: u64,
    },
    /// Show on the board what a host is.
    ShowHost {
        /// Its row.
        host: u32,
        /// What.
        shown: Shown,
    },
    /// Empty a host's row and remove its socket.
    DropHost {
        /// Its row.
        host: u32,
    },
    /// Kill whatever a buried host has left. [`Event::Swept`] follows when nothing is there any more.
    Sweep {
        /// Its epoch, which its programs carry as a mark.
        epoch: u32,
    },
    /// Show on the board that a child was killed, hangs in the kernel and will do nothing more. It is buried like any other
    /// when it has ended.
    ShowGhost {
        /// Which.
        epoch: u32,
    },
    /// Show the master's phase on the board.
    SetPhase(MasterPhase),
    /// Show how many workers are wanted.
    SetTarget(u32),
    /// Show whether a reload is under way.
    SetReloading(bool),
    /// Validate the configuration. One [`Event::Compiled`] follows, unless it is given up before.
    Compile,
    /// Give up the validation; no event follows.
    StopCompile,
    /// The configuration just validated is that generation's.
    Keep {
        /// Its number.
        generation: u32,
    },
    /// Children are born with this generation from now on; older configurations are not needed any more.
    Adopt {
        /// Its number.
        generation: u32,
        /// Its rules.
        rules: Rules,
    },
    /// No child of that generation will be born.
    Forget {
        /// Its number.
        generation: u32,
    },
    /// Answer somebody: the generation or the number of workers now, or why not.
    Answer {
        /// Who asked.
        caller: Caller,
        /// What came of it.
        outcome: Result<u32, Refusal>,
    },
    /// Find out what a child is doing that does not beat, and tell the operator. It must not be held up by that.
    Diagnose {
        /// Which.
        epoch: u32,
    },
    /// Count something.
    Count(Tally),
    /// Show how many slots keep dying.
    SetDegraded(u32),
    /// Tell the operator that the gateway serves.
    Announce,
    /// Write the run file: the set of children has changed.
    SaveRun,
    /// Refuse connects from now on.
    CloseListeners,
    /// Kill what is left of a predecessor's children.
    KillOrphans,
    /// Tell the operator.
    Say(String),
    /// Leave, with this code. The last action of a run; every child is buried.
    Exit(u8),
}
