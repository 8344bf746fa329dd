//! `mclora`: the reference host. It talks to the plugin through `megacontext-lora-abi` alone, as any host would.
//!
//! Flags and a TOML file become the JSON parameters of a job ([`params`]); the plugin validates them, so that every message
//! about a setting comes from one place. Events become a progress bar, plain lines or JSON lines ([`progress`]); results
//! become tables ([`tables`]) or one JSON object on stdout.
//!
//! Exit codes: 0 done; 2 the command or a setting is wrong; 130 interrupted; 1 anything else. One message on stderr.

mod args;
mod args_cycle;
mod args_gist;
mod args_lens;
mod bench;
mod commands;
mod failure;
mod load;
mod lora;
mod params;
mod progress;
mod quickstart;
mod sweep;
mod tables;
mod train;
mod train_cycle;
mod train_lens;

use args::{Cli, Command, EvalCommand, PluginCommand};
use args_gist::TrainCommand;
use clap::Parser;
use failure::{Failure, Result};
use serde_json::{Value, json};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let as_json = cli.global.json;
    match run(cli) {
        Ok(result) => {
            if as_json {
                println!("{result}");
            }
            ExitCode::SUCCESS
        }
        Err(failure) => {
            if as_json {
                println!("{}", json!({ "error": failure.to_json() }));
            }
            eprintln!("error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<Value> {
    let global = cli.global;
    let command = cli.command.unwrap_or_else(|| Command::Quickstart(args::Quickstart::default()));
    if let Some(device) = global.device.as_deref().filter(|_| !command.has_passes()) {
        return Err(Failure::usage(format!(
            "--device: expected none for a command that runs no passes of a model, got {device}"
        )));
    }
    match command {
        Command::Quickstart(args) => quickstart::run(&args, &global),
        Command::Extend(args) => commands::extend(&args, &global),
        Command::Sweep(args) => sweep::run(&args, &global),
        Command::Train(args) => match args.network {
            None => train_cycle::run(&args.cycle, &global),
            Some(TrainCommand::Gistnet(args)) => train::gistnet(&args, &global),
            Some(TrainCommand::Lensnet(args)) => train_lens::lensnet(&args, &global),
        },
        Command::Eval(EvalCommand::Ppl(args)) => commands::eval_ppl(&args, &global),
        Command::Eval(EvalCommand::Passkey(args)) => commands::eval_passkey(&args, &global),
        Command::Eval(EvalCommand::Gist(args)) => train::eval_gist(&args, &global),
        Command::Eval(EvalCommand::Gap(args)) => commands::eval_gap(&args, &global),
        Command::Generate(args) => commands::generate(&args, &global),
        Command::Merge(args) => commands::merge(&args, &global),
        Command::Export(args) => commands::export(&args, &global),
        Command::Logits(args) => commands::logits(&args, &global),
        Command::Rope(args) => commands::rope(&args, &global),
        Command::Pretrain(args) => commands::pretrain(&args, &global),
        Command::Report(args) => commands::report(&args, &global),
        Command::Bench(command) => bench::run(&command, &global),
        Command::Plugin(PluginCommand::Check(args)) => commands::plugin_check(&args, &global),
    }
}
