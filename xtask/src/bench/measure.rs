//! What is measured, in which order.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::load::{self, Load};
use super::subject::{Kind, Place, Subject};
use super::{Options, mock, proc};

/// What `--only` may name.
pub const PARTS: [&str; 6] = ["unary", "streams", "memory", "pss", "start", "programs"];

/// The quantities, in the table's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// CPU of the tree per 10,000 requests, one at a time, ms.
    UnaryCpu1,
    /// The same with 64 at a time, ms.
    UnaryCpu64,
    /// CPU of the tree per 10,000 chunks that come as fast as they are read, ms.
    ChunkCpuDense,
    /// The same with 5 ms between two chunks of a stream, 64 streams at a time, ms.
    ChunkCpuPaced,
    /// Requests per second with 64 at a time and one core.
    Rate,
    /// Median latency of one request at a time, us.
    P50At1,
    /// Its 99th percentile, us.
    P99At1,
    /// Median latency with 64 at a time and an upstream that takes 20 ms, us.
    P50At64,
    /// Its 99th percentile, us.
    P99At64,
    /// RssAnon of the tree after its first answer, KiB.
    RssIdle,
    /// RssAnon per held stream from 1,000 to 2,000 streams, KiB.
    RssStream,
    /// PSS of the idle tree, KiB; Evergate with two workers.
    Pss,
    /// From exec to the first right answer, ms.
    FirstAnswer,
}

/// Values of each quantity and column, one per pair, in the order of the pairs.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<(Measure, &'static str), Vec<f64>>);

impl Samples {
    fn push(&mut self, measure: Measure, kind: Kind, value: f64) {
        self.0.entry((measure, kind.title())).or_default().push(value);
    }

    /// The values of a column; empty when it was not measured.
    pub fn of(&self, measure: Measure, column: &str) -> &[f64] {
        let found = self.0.iter().find(|((of, title), _)| *of == measure && *title == column);
        found.map_or(&[], |(_, values)| values.as_slice())
    }
}

const UNARY_1: Load = Load { model: "u0", connections: 1, requests: 10_000, events: 0 };
const UNARY_64: Load = Load { model: "u0", connections: 64, requests: 10_000, events: 0 };
/// Latency is looked at below saturation: above it, it only says the rate once more.
const UNHURRIED_64: Load = Load { model: "u20", connections: 64, requests: 3_200, events: 0 };
const DENSE_CHUNKS: u32 = 500;
const DENSE: Load =
    Load { model: "s500x0", connections: 8, requests: 40, events: DENSE_CHUNKS as u64 + mock::CLOSING_EVENTS };
const PACED_CHUNKS: u32 = 160;
const PACED: Load =
    Load { model: "s160x5", connections: 64, requests: 128, events: PACED_CHUNKS as u64 + mock::CLOSING_EVENTS };

/// Measures everything that was asked for.
pub async fn run(options: &Options, place: &Place) -> Result<Samples, String> {
    let mut samples = Samples::default();
    let kinds = kinds(options);
    if options.wants("unary") || options.wants("streams") {
        serving(options, place, &kinds, &mut samples).await?;
    }
    for pair in 0..options.pairs {
        for kind in order(&kinds, pair).filter(|kind| *kind != Kind::Direct) {
            if options.wants("memory") {
                memory(place, kind, &mut samples).await?;
            }
            if options.wants("start") {
                let subject = Subject::start(kind, place).await?;
                samples.push(Measure::FirstAnswer, kind, millis(subject.first_answer));
                subject.end();
            }
        }
        if options.wants("pss") && options.has_evergate {
            pss(place, &mut samples).await?;
        }
        eprintln!("bench: memory and start, pair {} of {}", pair + 1, options.pairs);
    }
    Ok(samples)
}

fn kinds(options: &Options) -> Vec<Kind> {
    let mut kinds = vec![Kind::Direct, Kind::Nginx, Kind::Proxy];
    if options.has_evergate {
        kinds.push(Kind::Evergate { workers: 1 });
    }
    if super::subject::find_program("nginx").is_none() {
        eprintln!("SKIPPED nginx: it is not installed (apt-get install nginx-light); its column stays empty");
        kinds.retain(|kind| *kind != Kind::Nginx);
    }
    kinds
}

/// Every second pair runs the other way round, so that a drift of the machine favours nobody.
fn order(kinds: &[Kind], pair: usize) -> impl Iterator<Item = Kind> {
    let mut kinds = kinds.to_vec();
    if pair % 2 == 1 {
        kinds.reverse();
    }
    kinds.into_iter()
}

/// Requests and streams through subjects that stay up over all pairs.
async fn serving(options: &Options, place: &Place, kinds: &[Kind], samples: &mut Samples) -> Result<(), String> {
    let mut subjects = Vec::new();
    for kind in kinds {
        let subject = Subject::start(*kind, place).await?;
        for load in [Load { requests: 2_000, ..UNARY_64 }, Load { requests: 8, ..DENSE }] {
            cpu_of(&subject, load).await?;
        }
        subjects.push(subject);
    }
    for pair in 0..options.pairs {
        for kind in order(kinds, pair) {
            let Some(subject) = subjects.iter().find(|subject| subject.kind() == kind) else { continue };
            if options.wants("unary") {
                unary(subject, samples).await?;
            }
            if options.wants("streams") && kind != Kind::Direct {
                let (cpu, _) = cpu_of(subject, DENSE).await?;
                samples.push(Measure::ChunkCpuDense, kind, per_10_000(cpu, DENSE, DENSE_CHUNKS));
                let (cpu, _) = cpu_of(subject, PACED).await?;
                samples.push(Measure::ChunkCpuPaced, kind, per_10_000(cpu, PACED, PACED_CHUNKS));
            }
        }
        eprintln!("bench: requests and streams, pair {} of {}", pair + 1, options.pairs);
    }
    Ok(())
}

async fn unary(subject: &Subject, samples: &mut Samples) -> Result<(), String> {
    let kind = subject.kind();
    let micros = |nanos: u64| Duration::from_nanos(nanos).as_secs_f64() * 1e6;
    let (cpu, outcome) = cpu_of(subject, UNARY_1).await?;
    samples.push(Measure::UnaryCpu1, kind, per_10_000(cpu, UNARY_1, 1));
    samples.push(Measure::P50At1, kind, micros(outcome.percentile(50)));
    samples.push(Measure::P99At1, kind, micros(outcome.percentile(99)));
    let (cpu, outcome) = cpu_of(subject, UNARY_64).await?;
    samples.push(Measure::UnaryCpu64, kind, per_10_000(cpu, UNARY_64, 1));
    samples.push(Measure::Rate, kind, outcome.latencies.len() as f64 / outcome.elapsed.as_secs_f64());
    let (_, outcome) = cpu_of(subject, UNHURRIED_64).await?;
    samples.push(Measure::P50At64, kind, micros(outcome.percentile(50)));
    samples.push(Measure::P99At64, kind, micros(outcome.percentile(99)));
    Ok(())
}

/// CPU time in ms per 10,000 units.
fn per_10_000(cpu: Duration, load: Load, units: u32) -> f64 {
    millis(cpu) * 10_000.0 / (load.requests as f64 * f64::from(units))
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// CPU time of the subject's tree over a load. Any wrong answer is the end of the bench: what it cost says nothing.
async fn cpu_of(subject: &Subject, load: Load) -> Result<(Duration, load::Outcome), String> {
    let cpu = |subject: &Subject| subject.pid().map_or(0, proc::cpu_ns);
    let before = cpu(subject);
    let outcome = load::run(subject.address, load).await;
    // What is done after the answer (records, counters) belongs to the request too.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let spent = Duration::from_nanos(cpu(subject).saturating_sub(before));
    match outcome.errors.first() {
        None => Ok((spent, outcome)),
        Some(error) => Err(format!(
            "{}: {} of {} requests for {} failed, the first one: {error}",
            subject.kind().title(),
            outcome.errors.len(),
            load.requests,
            load.model
        )),
    }
}

/// Held streams in a fresh subject.
async fn memory(place: &Place, kind: Kind, samples: &mut Samples) -> Result<(), String> {
    const STEP: u16 = 1_000;
    let subject = Subject::start(kind, place).await?;
    let Some(pid) = subject.pid() else { return Ok(()) };
    let name = |error: String| format!("{}: held streams: {error}", kind.title());
    samples.push(Measure::RssIdle, kind, settled(|| proc::rss_anon_kib(pid)).await);
    let first = load::hold(subject.address, STEP.into()).await.map_err(name)?;
    let at_1000 = settled(|| proc::rss_anon_kib(pid)).await;
    let second = load::hold(subject.address, STEP.into()).await.map_err(name)?;
    let at_2000 = settled(|| proc::rss_anon_kib(pid)).await;
    samples.push(Measure::RssStream, kind, (at_2000 - at_1000) / f64::from(STEP));
    drop((first, second));
    subject.end();
    Ok(())
}

async fn pss(place: &Place, samples: &mut Samples) -> Result<(), String> {
    const PROCESSES: usize = 4;
    let subject = Subject::start(Kind::Evergate { workers: 2 }, place).await?;
    let Some(pid) = subject.pid() else { return Ok(()) };
    let start = Instant::now();
    while proc::tree(pid).len() != PROCESSES {
        if start.elapsed() > Duration::from_secs(10) {
            return Err(format!("Evergate: {} processes instead of {PROCESSES}", proc::tree(pid).len()));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    samples.push(Measure::Pss, subject.kind(), settled(|| proc::pss_kib(pid)).await);
    subject.end();
    Ok(())
}

/// The value once it has stood still for 300 ms (or after 5 s, whatever it is then).
async fn settled(read: impl Fn() -> u64) -> f64 {
    let mut last = read();
    let mut still = 0;
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = read();
        still = if now.abs_diff(last) <= 16 { still + 1 } else { 0 };
        last = now;
        if still == 3 {
            break;
        }
    }
    last as f64
}
