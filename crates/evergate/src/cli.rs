//! The command line: what each word is called, and which code the process ends with (`inherit::code`).

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use evergate_core::config::{Overrides, parse_workers};
use evergate_core::inherit::code;
use evergate_core::plan::Address;

use crate::commands::{access, check, exits, logs, models, reload, scale, state_dir, status, stop};
use crate::lives::host::HostArgs;
use crate::lives::{ChildArgs, clerk, compile, host, serve, worker};

#[derive(Debug, Parser)]
#[command(name = "evergate", version, about = "An AI gateway that cannot be knocked over")]
#[command(disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway in the foreground until it is stopped (Ctrl-C, SIGTERM or "evergate stop")
    Serve(ServeArgs),
    /// Check a configuration and print it with every default written out; exit code 78 if it has mistakes
    Check(CheckArgs),
    /// Show what the running gateway is doing
    Status(AskArgs),
    /// Show how its processes ended, and which requests died with them
    Exits(AskArgs),
    /// Show the last requests, a line each, also without a running gateway
    Access(AccessArgs),
    /// Have the running gateway read its configuration again, and wait until the new one serves; exit code 78 if it has
    /// mistakes, 1 if it cannot be brought into force: then everything stays as it was
    Reload(AskArgs),
    /// Set the number of workers, within workers.min and max; the load may add to it and take away what it added
    Scale(ScaleArgs),
    /// Show what the programs that serve models are doing; "load NAME" and "unload NAME" start and stop one by hand
    Models(ModelsArgs),
    /// Show what a model's programs have written to standard error
    Logs(LogsArgs),
    /// Stop the running gateway and wait until it is gone
    Stop(StopArgs),
    /// Validate a configuration for the master
    #[command(hide = true)]
    Compile(ConfigArgs),
    /// Serve requests
    #[command(hide = true)]
    Worker(ChildArgs),
    /// Keep the records
    #[command(hide = true)]
    Clerk(ChildArgs),
    /// Run a model's program
    #[command(hide = true)]
    Host(HostArgs),
}

/// Which configuration, and what the command line says over it.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigArgs {
    /// Configuration file; without it ./evergate.toml if it exists, else built-in defaults
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address to listen on instead of the file's: IP:PORT or unix:/PATH
    #[arg(long, value_name = "ADDR", value_parser = parse_listen)]
    pub listen: Option<String>,
    /// Number of workers instead of the file's
    #[arg(long, value_name = "MIN[:MAX]", value_parser = parse_workers)]
    pub workers: Option<(u32, Option<u32>)>,
}

impl ConfigArgs {
    /// The part that goes over the file.
    #[must_use]
    pub fn overrides(&self) -> Overrides {
        Overrides { listen: self.listen.clone(), workers: self.workers }
    }
}

/// Where the state folder is.
#[derive(Args, Clone, Debug)]
pub struct StateArgs {
    /// Folder of the run's state; default $XDG_STATE_HOME/evergate, else ~/.local/state/evergate (root: /var/lib/evergate)
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct ServeArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// End the start at the first worker that fails to boot, even if others serve; without it only when every worker has
    #[arg(long)]
    halt_on_boot_error: bool,
    #[command(flatten)]
    state: StateArgs,
}

#[derive(Args, Debug)]
struct ModelsArgs {
    /// What to do with one of them
    #[arg(value_name = "load|unload", value_parser = ["load", "unload"], requires = "name")]
    order: Option<String>,
    /// Its upstream's name
    #[arg(value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    ask: AskArgs,
}

#[derive(Args, Debug)]
struct LogsArgs {
    /// Its upstream's name
    #[arg(value_name = "NAME")]
    name: String,
    /// Go on as it grows
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    state: StateArgs,
}

#[derive(Args, Debug)]
struct ScaleArgs {
    /// Workers wanted
    #[arg(value_name = "N")]
    workers: u32,
    #[command(flatten)]
    ask: AskArgs,
}

#[derive(Args, Debug)]
struct CheckArgs {
    /// Configuration file; without it ./evergate.toml if it exists, else built-in defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct AskArgs {
    #[command(flatten)]
    state: StateArgs,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct AccessArgs {
    /// How many of those that are on record
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    last: usize,
    /// Go on with those to come, until interrupted
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    state: StateArgs,
    /// Print the records as they are, a JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct StopArgs {
    /// Do not wait for requests in flight: cancel them
    #[arg(long)]
    now: bool,
    #[command(flatten)]
    ask: AskArgs,
}

/// Reads the command line, does what it says and gives the code to end with.
#[must_use]
pub fn main() -> ExitCode {
    let outcome = Cli::try_parse();
    ExitCode::from(match outcome {
        Ok(cli) => run(cli.command),
        Err(error) => {
            // Help and version go to standard output. A closed output leaves nobody to tell.
            let _ = error.print();
            if error.use_stderr() { code::USAGE } else { code::OK }
        }
    })
}

fn run(command: Command) -> u8 {
    match command {
        Command::Serve(args) => {
            with_state(&args.state, |state| serve::run(&args.config, args.halt_on_boot_error, state))
        }
        Command::Check(args) => {
            let config = ConfigArgs { config: args.config, ..ConfigArgs::default() };
            check::run(&config, form(args.json))
        }
        Command::Status(args) => with_state(&args.state, |state| status::run(state, form(args.json))),
        Command::Exits(args) => with_state(&args.state, |state| exits::run(state, form(args.json))),
        Command::Access(args) => {
            let wanted = access::Wanted { last: args.last, is_followed: args.follow, form: form(args.json) };
            with_state(&args.state, |state| access::run(state, wanted))
        }
        Command::Reload(args) => with_state(&args.state, |state| reload::run(state, form(args.json))),
        Command::Scale(args) => {
            with_state(&args.ask.state, |state| scale::run(state, args.workers, form(args.ask.json)))
        }
        Command::Models(args) => with_state(&args.ask.state, |state| match (&args.order, &args.name) {
            (Some(order), Some(name)) => models::order(state, order, name, form(args.ask.json)),
            _ => models::run(state, form(args.ask.json)),
        }),
        Command::Logs(args) => with_state(&args.state, |state| logs::run(state, &args.name, args.follow)),
        Command::Stop(args) => {
            let how = if args.now { stop::How::Now } else { stop::How::Graceful };
            with_state(&args.ask.state, |state| stop::run(state, how, form(args.ask.json)))
        }
        Command::Compile(args) => compile::run(&args),
        Command::Worker(args) => worker::run(&args),
        Command::Clerk(args) => clerk::run(&args),
        Command::Host(args) => host::run(&args),
    }
}

/// How data is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people.
    Text,
    /// For programs.
    Json,
}

fn form(json: bool) -> Form {
    if json { Form::Json } else { Form::Text }
}

fn with_state(args: &StateArgs, command: impl FnOnce(&std::path::Path) -> u8) -> u8 {
    match state_dir::choose(args.state_dir.as_deref(), &|name| std::env::var_os(name), state_dir::user()) {
        Ok(folder) => command(&folder),
        Err(why) => {
            eprintln!("evergate: {why}");
            code::USAGE
        }
    }
}

/// An address that can be read; whether it may be listened on depends on the rest of the configuration.
fn parse_listen(text: &str) -> Result<String, String> {
    text.parse::<Address>().map(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(words: &[&str]) -> Result<Command, clap::Error> {
        Cli::try_parse_from(["evergate"].iter().chain(words)).map(|cli| cli.command)
    }

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_reach_their_places() {
        let Ok(Command::Serve(args)) =
            parse(&["serve", "--config", "x.toml", "--listen", "127.0.0.1:0", "--workers", "2:4", "--state-dir", "/s"])
        else {
            panic!("not serve");
        };
        assert_eq!(args.config.workers, Some((2, Some(4))));
        assert_eq!(args.config.listen.as_deref(), Some("127.0.0.1:0"));
        assert_eq!(args.state.state_dir.as_deref(), Some(std::path::Path::new("/s")));
        assert!(matches!(parse(&["stop", "--now", "--json"]), Ok(Command::Stop(args)) if args.now && args.ask.json));
        let Ok(Command::Worker(args)) =
            parse(&["worker", "--row", "1", "--epoch", "2", "--generation", "3", "--listeners", "4"])
        else {
            panic!("not worker");
        };
        assert_eq!(args, ChildArgs { row: 1, epoch: 2, generation: 3, listeners: 4 });
    }

    #[test]
    fn wrong_words_are_usage_errors() {
        let wrong: [&[&str]; 10] = [
            &[],
            &["dance"],
            &["serve", "--wrong"],
            &["serve", "--workers", "many"],
            &["serve", "--listen", "nowhere"],
            &["reload", "now"],
            &["scale"],
            &["scale", "many"],
            &["worker", "--row", "1"],
            &["clerk", "--row", "1", "--epoch", "2", "--generation", "3", "--listeners", "4000"],
        ];
        for words in wrong {
            assert!(parse(words).is_err_and(|error| error.use_stderr()), "{words:?}");
        }
        assert!(parse(&["--help"]).is_err_and(|error| !error.use_stderr()));
        assert!(parse(&["--version"]).is_err_and(|error| !error.use_stderr()));
    }

    #[test]
    fn hidden_words_are_not_in_the_help() {
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains("serve") && !help.contains("clerk") && !help.contains("compile"), "{help}");
    }
}
