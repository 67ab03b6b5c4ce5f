//! Instructions per request, counted by callgrind: the guard against drift that a busy machine cannot blur.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use super::alone::{self, Alone};
use super::load::{self, Load};
use super::subject::{self, Place, find_program};
use super::{Options, mock, proc};

/// Drift that is not one: another compiler inlines differently, another C library has another `memcpy`.
const TOLERANCE_PERCENT: u64 = 5;
/// A folder that callgrind's files are copied to, for `callgrind_annotate`.
const KEEP: &str = "EVERGATE_BENCH_KEEP";
const REQUESTS: u64 = 400;
const CHUNKS: u64 = 100;
const STREAMS: u64 = 20;

const UNARY: Load = Load { model: "u0", connections: 1, requests: REQUESTS, events: 0 };
const STREAM: Load = Load { model: "s100x0", connections: 1, requests: STREAMS, events: CHUNKS + mock::CLOSING_EVENTS };

/// Counts, prints, and compares with the committed numbers; whether there was no drift.
pub async fn run(options: &Options, place: Place, root: &Path) -> Result<bool, String> {
    let Some(valgrind) = find_program("valgrind") else {
        eprintln!("SKIPPED instructions: valgrind is not installed (apt-get install valgrind)");
        return Ok(true);
    };
    let mut counts = Vec::new();
    for is_proxy in [true, false] {
        let count = async |loads: &[Load]| count(&place, &valgrind, is_proxy, loads).await;
        // What both of two runs do (start, warm up, stop) falls out of their difference.
        let once = count(&[UNARY]).await?;
        let unary = count(&[UNARY, UNARY]).await?.saturating_sub(once) / REQUESTS;
        let chunk = count(&[UNARY, STREAM]).await?.saturating_sub(once) / (STREAMS * CHUNKS);
        counts.push([("unary", unary), ("chunk", chunk)]);
    }
    let [proxy, counted] = counts.as_slice() else { return Err("nothing was counted".into()) };
    for (name, count) in proxy {
        println!("instructions of the hyper proxy per {name}: {count}");
    }
    println!("instructions of the worker on {}:", proc::machine());
    let path = root.join("xtask").join("instructions.txt");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let mut kept = String::from(
        "# Worker instructions per unary request and per chunk: cargo xtask bench --instructions --write\n",
    );
    let mut is_steady = true;
    for &(name, count) in counted {
        let before = committed.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        let words = match before {
            None => "no committed number".to_string(),
            Some(before) => {
                let is_within = count.abs_diff(before) * 100 <= before * TOLERANCE_PERCENT;
                is_steady &= is_within;
                format!("committed {before}: {}", if is_within { "steady" } else { "DRIFTED" })
            }
        };
        println!("  per {name}: {count} ({words})");
        let _ = writeln!(kept, "{name} {count}");
    }
    if options.is_write {
        std::fs::write(&path, kept).map_err(|error| format!("xtask/instructions.txt: {error}"))?;
    }
    Ok(is_steady)
}

/// Instructions of a whole life, the worker's or the proxy's, under some loads.
async fn count(place: &Place, valgrind: &Path, is_proxy: bool, loads: &[Load]) -> Result<u64, String> {
    let models: Vec<&str> = loads.iter().map(|load| load.model).collect();
    let name = format!("callgrind.{}.{}", if is_proxy { "proxy" } else { "worker" }, models.join("-"));
    let file = place.folder.join(&name);
    let under = alone::callgrind(valgrind.into(), &file);
    // callgrind writes its file when the process ends.
    if is_proxy {
        let proxy = subject::start_proxy_under(place, &under)?;
        send(proxy.address, loads).await?;
        proxy.end();
    } else {
        let alone = Alone::start(place, &under)?;
        send(alone.address, loads).await?;
        alone.end()?;
    }
    let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    if let Some(folder) = std::env::var_os(KEEP) {
        let kept = Path::new(&folder).join(name);
        std::fs::write(&kept, &text).map_err(|error| format!("{}: {error}", kept.display()))?;
    }
    let totals = text.lines().find_map(|line| line.strip_prefix("totals:").or_else(|| line.strip_prefix("summary:")));
    totals.and_then(|text| text.trim().parse().ok()).ok_or_else(|| format!("{}: no totals", file.display()))
}

async fn send(address: SocketAddr, loads: &[Load]) -> Result<(), String> {
    for load in loads {
        let outcome = load::run(address, *load).await;
        if let Some(error) = outcome.errors.first() {
            return Err(format!("under callgrind: {error}"));
        }
    }
    Ok(())
}
