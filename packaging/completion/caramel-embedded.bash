# bash completion for caramel-embedded(8); checked against the program's options by tests/packaging/test_packaging_man.py.

_caramel_embedded() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    case $before in
        --ca-cert | --identity-ca | --key-file | --openssl-conf | --config)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
            ;;
        --owner)
            mapfile -t COMPREPLY < <(compgen -u -- "$word")
            ;;
        --group)
            mapfile -t COMPREPLY < <(compgen -g -- "$word")
            ;;
        --interfaces)
            mapfile -t COMPREPLY < <(cd /sys/class/net && compgen -G "$word*")
            ;;
        --hook | --key-command)
            mapfile -t COMPREPLY < <(compgen -c -- "$word")
            ;;
        --server)
            mapfile -t COMPREPLY < <(compgen -A hostname -- "$word")
            ;;
        --mode)
            mapfile -t COMPREPLY < <(compgen -W '0600 0640 0644' -- "$word")
            ;;
        --key-type)
            mapfile -t COMPREPLY < <(compgen -W 'rsa-2048 rsa-4096 ec-p256' -- "$word")
            ;;
        --groups)
            mapfile -t COMPREPLY < <(compgen -W 'small default' -- "$word")
            ;;
        --client-id | --domain | --instance | --timeout) ;;
        *)
            mapfile -t COMPREPLY < <(compgen -W '
                --server --ca-cert --identity-ca --key-file --client-id --interfaces --domain --key-type --key-command
                --openssl-conf --groups --owner --group --mode --timeout --hook --config --instance --replace --status --dry-run --json --syslog --verbose --quiet --version --help -v -q -h
            ' -- "$word")
            ;;
    esac
}

complete -F _caramel_embedded caramel-embedded
